//! The objects of flannel's HTTP API, both ways; the server and [`RemoteStore`](super::RemoteStore) share them.
//!
//! Field names and their order are those of flannel v0.5 to v0.7, whose programs are on the other end of the wire. What
//! those versions had no word for is added only where it is needed, because their decoders skip unknown fields:
//! `IPv6Subnet` beside `Subnet` for a dual-stack lease (flannel v0.28's name for it), `PublicIPv6` and `BackendV6Data`
//! inside `Attrs`.
//!
//! Times are RFC 3339 with nanoseconds in UTC; `0001-01-01T00:00:00Z`, Go's zero time, means "none".

use std::fmt::Write;
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::addr::{Ipv4Prefix, Ipv6Prefix};
use crate::lease::json::{JsonError, Object, compact};
use crate::lease::{Expiration, Lease, LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};

/// Go's zero time: no expiration.
const ZERO_TIME: &str = "0001-01-01T00:00:00Z";

/// The largest single lease read.
pub const MAX_LEASE_BYTES: usize = LeaseAttrs::MAX_BYTES + 1024;

/// Writes a node's attributes as the API does: like the stored value, but `PublicIPv6` only if there is one.
pub fn attrs_json(attrs: &LeaseAttrs) -> String {
    // `PublicIPv6` is the second field, behind an address: the first match is the field.
    attrs.to_json().replacen(",\"PublicIPv6\":null", "", 1)
}

/// Writes a lease.
pub fn lease_json(lease: &Lease) -> String {
    let mut out = format!("{{\"Subnet\":\"{}\"", lease.subnet.v4);
    if let Some(v6) = lease.subnet.v6 {
        // Writing into a String cannot fail.
        let _ = write!(out, ",\"IPv6Subnet\":\"{v6}\"");
    }
    let _ = write!(
        out,
        ",\"Attrs\":{},\"Expiration\":\"{}\"}}",
        attrs_json(&lease.attrs),
        time_text(lease.expiration)
    );
    out
}

/// Writes a reservation. Old servers know of IPv4 only and skip the rest.
pub fn reservation_json(subnet: Subnet, attrs: &LeaseAttrs) -> String {
    let mut out = format!("{{\"Subnet\":\"{}\"", subnet.v4);
    // Writing into a String cannot fail.
    if let Some(v6) = subnet.v6 {
        let _ = write!(out, ",\"IPv6Subnet\":\"{v6}\"");
    }
    let _ = write!(out, ",\"PublicIP\":\"{}\"", attrs.public_ip);
    if let Some(v6) = attrs.public_ipv6 {
        let _ = write!(out, ",\"PublicIPv6\":\"{v6}\"");
    }
    out.push('}');
    out
}

/// Reads a lease.
///
/// `Attrs` may be `null` or absent, as from v0.5 servers; it is then `None`.
///
/// # Errors
/// Not a JSON object, or a field is malformed.
pub fn parse_lease(text: &str) -> Result<ApiLease, JsonError> {
    let object = Object::parse(text, MAX_LEASE_BYTES)?;
    let v4: Ipv4Prefix = object
        .parsed("Subnet", "must be an IPv4 network in quotes")?
        .ok_or_else(|| JsonError::field("Subnet", "absent", "must be an IPv4 network in quotes"))?;
    let v6: Option<Ipv6Prefix> = object
        .string("IPv6Subnet")?
        .filter(|text| !text.is_empty() && text != "::/0")
        .and_then(|text| text.parse().ok());
    let attrs = match object.raw("Attrs") {
        None | Some("null") => None,
        Some(raw) => Some(LeaseAttrs::from_json(raw.as_bytes())?),
    };
    let expiration = match object.string("Expiration")? {
        None => Expiration::Never,
        Some(text) => parse_time(&text)
            .ok_or_else(|| JsonError::field("Expiration", &text, "must be an RFC 3339 time in quotes"))?,
    };
    Ok(ApiLease {
        subnet: Subnet { v4, v6 },
        attrs,
        expiration,
    })
}

/// A lease as the API carries it: its attributes may be missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiLease {
    /// The subnet.
    pub subnet: Subnet,
    /// Who holds it.
    pub attrs: Option<LeaseAttrs>,
    /// When it ends.
    pub expiration: Expiration,
}

impl ApiLease {
    /// The lease, if its attributes are known.
    pub fn into_lease(self) -> Option<Lease> {
        Some(Lease {
            subnet: self.subnet,
            attrs: self.attrs?,
            expiration: self.expiration,
            created: None,
        })
    }
}

/// Writes one event.
pub fn event_json(event: &LeaseEvent) -> String {
    match event {
        LeaseEvent::Added(lease) => format!("{{\"type\":\"added\",\"lease\":{}}}", lease_json(lease)),
        LeaseEvent::Removed(subnet) => {
            let v6 = match subnet.v6 {
                Some(v6) => format!(",\"IPv6Subnet\":\"{v6}\""),
                None => String::new(),
            };
            format!(
                "{{\"type\":\"removed\",\"lease\":{{\"Subnet\":\"{}\"{v6},\"Attrs\":{{\"PublicIP\":\"0.0.0.0\"}},\
                 \"Expiration\":\"{ZERO_TIME}\"}}}}",
                subnet.v4
            )
        }
    }
}

/// Writes the answer to a watch: events.
pub fn events_json<'a>(events: impl Iterator<Item = &'a LeaseEvent>, cursor: &str) -> String {
    let events: Vec<String> = events.map(event_json).collect();
    join_events(events.iter().map(String::as_str), cursor)
}

/// Writes the answer to a watch: events that were written one by one.
pub fn join_events<'a>(events: impl Iterator<Item = &'a str>, cursor: &str) -> String {
    let mut out = String::from("{\"events\":[");
    for (i, event) in events.enumerate() {
        if i > 0 {
            out.push(',');
        }
        out.push_str(event);
    }
    let _ = writeln!(out, "],\"snapshot\":null,\"cursor\":\"{cursor}\"}}");
    out
}

/// Writes the answer to a watch: a snapshot.
pub fn snapshot_json<'a>(leases: impl Iterator<Item = &'a Lease>, cursor: &str) -> String {
    let mut out = String::from("{\"events\":null,\"snapshot\":[");
    for (i, lease) in leases.enumerate() {
        if i > 0 {
            out.push(',');
        }
        out.push_str(&lease_json(lease));
    }
    let _ = writeln!(out, "],\"cursor\":\"{cursor}\"}}");
    out
}

/// The answer to a watch, as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchAnswer {
    /// What it says; `None` if it says nothing at all.
    pub update: Option<LeaseUpdate>,
    /// Where to resume.
    pub cursor: String,
    /// Entries left out because they could not be read: flannel's own clients stall on such, we skip them.
    pub skipped: usize,
}

/// Reads the answer to a watch by flannel's rule: events if there are any, else the snapshot.
///
/// # Errors
/// Not an object of this kind, or no cursor.
pub fn parse_watch(text: &str) -> Result<WatchAnswer, String> {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(borrow, default)]
        events: Option<Vec<&'a RawValue>>,
        #[serde(borrow, default)]
        snapshot: Option<Vec<&'a RawValue>>,
        cursor: String,
    }
    let answer: Answer<'_> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let events = answer.events.unwrap_or_default();
    let given = if events.is_empty() {
        answer.snapshot.as_ref().map_or(0, Vec::len)
    } else {
        events.len()
    };
    let update = if events.is_empty() {
        answer.snapshot.map(|leases| {
            let read = |raw: &RawValue| parse_lease(raw.get()).ok()?.into_lease();
            LeaseUpdate::Snapshot(leases.into_iter().filter_map(read).collect())
        })
    } else {
        Some(LeaseUpdate::Events(
            events
                .into_iter()
                .filter_map(|raw| parse_event(raw.get()))
                .collect(),
        ))
    };
    let read = match &update {
        Some(LeaseUpdate::Snapshot(leases)) => leases.len(),
        Some(LeaseUpdate::Events(events)) => events.len(),
        None => 0,
    };
    Ok(WatchAnswer {
        update,
        cursor: answer.cursor,
        skipped: given - read,
    })
}

fn parse_event(text: &str) -> Option<LeaseEvent> {
    let object = Object::parse(text, MAX_LEASE_BYTES + 1024).ok()?;
    let lease = parse_lease(object.raw("lease")?).ok()?;
    match object.string("type").ok()??.as_str() {
        "added" => lease.into_lease().map(LeaseEvent::Added),
        "removed" => Some(LeaseEvent::Removed(lease.subnet)),
        _ => None,
    }
}

/// Undoes what flannel v0.5.6 to v0.7.1 servers do to their clients: a `BackendData` that is the base64 of JSON text is
/// replaced by that JSON.
///
/// Those servers, built with Go 1.6, encode raw JSON in their answer to a renewal as bytes; the client keeps the
/// string and sends it back with the next renewal.
pub fn repair_backend_data(attrs: &mut LeaseAttrs) {
    for data in [&mut attrs.backend_data, &mut attrs.backend_v6_data] {
        let decoded = data
            .as_deref()
            .filter(|data| data.starts_with('"'))
            .and_then(|data| serde_json::from_str::<String>(data).ok())
            .and_then(|text| STANDARD.decode(text).ok())
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .filter(|json| Object::parse(json, LeaseAttrs::MAX_BYTES).is_ok());
        if let Some(json) = decoded {
            *data = Some(compact(&json));
        }
    }
}

/// Writes an expiration as Go does.
pub fn time_text(expiration: Expiration) -> String {
    let Expiration::At(time) = expiration else {
        return ZERO_TIME.to_owned();
    };
    // Leases end in the future; a clock before 1970 reads as 1970.
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil_from_days(i64::try_from(days).unwrap_or(i64::MAX / 1000));
    let mut out = format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
        second / 3600,
        second / 60 % 60,
        second % 60
    );
    if since.subsec_nanos() > 0 {
        let fraction = format!(".{:09}", since.subsec_nanos());
        out.push_str(fraction.trim_end_matches('0'));
    }
    out.push('Z');
    out
}

/// Reads an RFC 3339 time; Go's zero time, and anything before 1970, means none.
pub fn parse_time(text: &str) -> Option<Expiration> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = text.get(from..to)?;
        digits
            .bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| digits.parse().ok())?
    };
    let at = |position: usize| bytes.get(position).copied();
    let separated = at(4)? == b'-'
        && at(7)? == b'-'
        && matches!(at(10)?, b'T' | b't')
        && at(13)? == b':'
        && at(16)? == b':';
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let in_range =
        (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second <= 60;
    if !separated || !in_range {
        return None;
    }
    let rest = text.get(19..)?;
    let (nanos, zone) = match rest.strip_prefix('.') {
        Some(fraction) => {
            let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
            let padded = format!("{:0<9}", fraction.get(..digits.min(9))?);
            (
                padded.parse::<u32>().ok().filter(|_| digits > 0)?,
                fraction.get(digits..)?,
            )
        }
        None => (0, rest),
    };
    let offset_s = match zone.as_bytes() {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let start = text.len() - 5;
            let seconds = number(start, start + 2)? * 3600 + number(start + 3, start + 5)? * 60;
            if *sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    let seconds = days_from_civil(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset_s;
    Some(match u64::try_from(seconds) {
        Ok(seconds) => Expiration::At(UNIX_EPOCH + Duration::new(seconds, nanos)),
        Err(_) => Expiration::Never,
    })
}

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar. Years begin in March here, so that the leap
/// day is a year's last; 400 years (an era) have 146,097 days.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The reverse of [`days_from_civil`]: year, month, day.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Exchanges captured from flannel v0.7.1.
    const LEASE: &str = r#"{"Subnet":"10.15.208.0/20","Attrs":{"PublicIP":"10.50.0.9","BackendType":"vxlan","BackendData":{"VtepMAC":"82:4b:b6:2f:54:4e"}},"Expiration":"2026-11-22T06:58:09.773242655Z"}"#;
    const ADDED: &str = r#"{"events":[{"type":"added","lease":{"Subnet":"10.33.0.0/20","Attrs":{"PublicIP":"10.50.0.3"},"Expiration":"0001-01-01T00:00:00Z"}}],"snapshot":null,"cursor":"11"}"#;
    const REMOVED: &str = r#"{"events":[{"type":"removed","lease":{"Subnet":"10.33.0.0/20","Attrs":{"PublicIP":"0.0.0.0"},"Expiration":"0001-01-01T00:00:00Z"}}],"snapshot":null,"cursor":"12"}"#;

    #[test]
    fn a_lease_is_flannels_to_the_byte() {
        let lease = parse_lease(LEASE).unwrap().into_lease().unwrap();
        assert_eq!(lease_json(&lease), LEASE);
    }

    #[test]
    fn watch_answers_are_flannels_to_the_byte() {
        for text in [ADDED, REMOVED] {
            let answer = parse_watch(text).unwrap();
            let Some(LeaseUpdate::Events(events)) = answer.update else {
                panic!("{text}");
            };
            assert_eq!(events_json(events.iter(), &answer.cursor).trim_end(), text);
        }
        let snapshot = format!("{{\"events\":null,\"snapshot\":[{LEASE},{LEASE}],\"cursor\":\"6\"}}");
        let answer = parse_watch(&snapshot).unwrap();
        let Some(LeaseUpdate::Snapshot(leases)) = answer.update else {
            panic!("{snapshot}");
        };
        assert_eq!(snapshot_json(leases.iter(), "6").trim_end(), snapshot);
    }

    #[test]
    fn a_dual_stack_lease_keeps_both_halves() {
        let lease = Lease {
            subnet: "10.1.0.0-24&fd00::-64".parse().unwrap(),
            attrs: LeaseAttrs::from_json(br#"{"PublicIP":"10.0.0.1","PublicIPv6":"fd50::1"}"#).unwrap(),
            expiration: Expiration::Never,
            created: None,
        };
        assert_eq!(
            parse_lease(&lease_json(&lease)).unwrap().into_lease(),
            Some(lease)
        );
    }

    #[test]
    fn unreadable_entries_are_skipped_and_counted() {
        let text = format!(
            r#"{{"events":[],"snapshot":[{LEASE},{{"Subnet":"junk"}},{{"Subnet":"10.0.0.0/24","Attrs":null}}],"cursor":"1"}}"#
        );
        let answer = parse_watch(&text).unwrap();
        assert_eq!(answer.skipped, 2);
        assert!(matches!(answer.update, Some(LeaseUpdate::Snapshot(leases)) if leases.len() == 1));
        let nothing = parse_watch(r#"{"events":null,"snapshot":null,"cursor":"1"}"#).unwrap();
        assert_eq!(nothing.update, None);
        for text in ["", "{}", r#"{"cursor":7}"#, "[]"] {
            assert!(parse_watch(text).is_err(), "{text}");
        }
    }

    #[test]
    fn base64_of_json_is_json_again() {
        let mut attrs = LeaseAttrs::from_json(
            br#"{"PublicIP":"10.0.0.1","BackendType":"vxlan","BackendData":"eyJWdGVwTUFDIjoiODI6NGI6YjY6MmY6NTQ6NGUifQ=="}"#,
        )
        .unwrap();
        repair_backend_data(&mut attrs);
        assert_eq!(
            attrs.backend_data.as_deref(),
            Some(r#"{"VtepMAC":"82:4b:b6:2f:54:4e"}"#)
        );
        // SRv6's data is base64 of binary: it stays.
        let mut attrs =
            LeaseAttrs::from_json(br#"{"PublicIP":"10.0.0.1","BackendData":"/QAAAQ=="}"#).unwrap();
        repair_backend_data(&mut attrs);
        assert_eq!(attrs.backend_data.as_deref(), Some(r#""/QAAAQ==""#));
    }

    #[test]
    fn times_are_read_in_every_zone_and_written_in_utc() {
        for (text, written) in [
            ("2026-11-22T06:58:09.773242655Z", "2026-11-22T06:58:09.773242655Z"),
            ("2024-02-29T23:59:59Z", "2024-02-29T23:59:59Z"),
            ("2026-01-01T00:30:00.500+01:00", "2025-12-31T23:30:00.5Z"),
            ("2000-03-01T00:00:00-00:30", "2000-03-01T00:30:00Z"),
            ("1970-01-01T00:00:00Z", "1970-01-01T00:00:00Z"),
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
        ] {
            assert_eq!(time_text(parse_time(text).unwrap()), written, "{text}");
        }
        for text in [
            "",
            "now",
            "2026-13-01T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01 00:00:00Z",
            "2026-01-01T00:00:00",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00+0100",
            "2026-01-01T00:00:00Zé",
        ] {
            assert!(parse_time(text).is_none(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn days_and_dates_agree(days in -1_000_000_i64..1_000_000) {
            let (year, month, day) = civil_from_days(days);
            prop_assert!((1..=12).contains(&month) && (1..=31).contains(&day));
            prop_assert_eq!(days_from_civil(year, month, day), days);
        }

        #[test]
        fn no_text_makes_the_decoders_panic(text in ".*") {
            let _ = parse_time(&text);
            let _ = parse_lease(&text);
            let _ = parse_watch(&text);
        }
    }
}
