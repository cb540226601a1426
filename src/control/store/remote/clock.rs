//! A server's clock and ours.
//!
//! A server says at what time of its clock a lease ends. A node whose clock is an hour behind would take a lease of one hour for one of two
//! and let it run out. An answer bears the time it was given, too; what lies between the two is how long the lease lasts.

use std::time::{Duration, SystemTime};

use hyper::HeaderMap;
use hyper::header::DATE;

use super::objects::parse_time;
use crate::control::store::expires_in;
use crate::lease::Expiration;

/// Clocks less than this apart are taken for one: an answer is on its way for a while, and bears whole seconds.
const APART: Duration = Duration::from_secs(5);

/// When a lease ends by our clock. Without a date, both clocks are taken to be right.
#[expect(
    clippy::disallowed_methods,
    reason = "a server gives the end of a lease as wall-clock time, which is compared with its own"
)]
pub(super) fn here(end: Expiration, headers: &HeaderMap) -> Expiration {
    let date = headers.get(DATE).and_then(|date| date.to_str().ok());
    let (Expiration::At(at), Some(Expiration::At(told))) = (end, date.and_then(parse_date)) else {
        return end;
    };
    let now = SystemTime::now();
    let apart = now.duration_since(told).unwrap_or_else(|error| error.duration());
    if apart < APART {
        return end;
    }
    expires_in(at.duration_since(told).unwrap_or_default())
}

/// Reads an HTTP date as every server writes it: `Sun, 06 Nov 1994 08:49:37 GMT`.
fn parse_date(text: &str) -> Option<Expiration> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let mut words = text.split(' ').skip(1);
    let (day, month, year, time) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    parse_time(&format!("{year}-{month:02}-{day}T{time}Z"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::store::remote::objects::time_text;

    #[test]
    fn dates_are_read_as_http_writes_them() {
        let read = |text: &str| parse_date(text).map(time_text);
        assert_eq!(
            read("Sun, 22 Nov 2026 06:58:09 GMT").as_deref(),
            Some("2026-11-22T06:58:09Z")
        );
        for text in [
            "",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun, 06 Xxx 1994 08:49:37 GMT",
            "Sun,",
        ] {
            assert_eq!(read(text), None, "{text:?}");
        }
    }

    /// A server an hour ahead of us, and one that is right.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "it is about wall-clock time")]
    fn a_lease_lasts_as_long_here_as_where_it_was_given() {
        let left = |end: Expiration| match end {
            Expiration::At(at) => at.duration_since(SystemTime::now()).unwrap().as_secs() + 1,
            Expiration::Never => panic!("it ends"),
        };
        let mut headers = HeaderMap::new();
        headers.insert(DATE, "Wed, 01 Jan 2042 10:00:00 GMT".parse().unwrap());
        let end = parse_time("2042-01-01T11:00:00Z").unwrap();
        assert!((3595..=3600).contains(&left(here(end, &headers))));
        // Behind us: neither has it ended.
        headers.insert(DATE, "Wed, 01 Jan 2020 10:00:00 GMT".parse().unwrap());
        let end = parse_time("2020-01-01T11:00:00Z").unwrap();
        assert!((3595..=3600).contains(&left(here(end, &headers))));
        assert_eq!(here(end, &HeaderMap::new()), end);
        assert_eq!(here(Expiration::Never, &headers), Expiration::Never);
    }
}
