//! What a kernel node is told to do, by the network's config and the leases of its peers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::json;

use super::item::Item;
use super::{Form, Seg6Plan};
use crate::addr::{Ipv6Prefix, MacAddr, Prefix};
use crate::control::config::NetworkConfig;
use crate::host::netlink::{Behavior, Gateway, Route, Seg6Mode, Seg6Route, Sid};
use crate::lab::leases::LARGEST_JSON;
use crate::lease::json::Object;
use crate::lease::{Lease, LeaseAttrs};

/// The backend's name in configs and leases.
const KIND: &str = "srv6";
/// Where locators are from if the config does not say: the proof of concept's, which knows no other.
const BLOCK: &str = "fd12:3456:789a::/48";
/// What is behind the locator in each segment of a node.
pub(super) const SOURCE: u128 = 1;
const DX4: u128 = 4;
const DT6: u128 = 6;
const DX6: u128 = 0xd6;
pub(super) const END: u128 = 0xe;

/// Everything that decides what the kernel is told.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    form: Form,
    block: Ipv6Prefix,
    locator: Ipv6Prefix,
    mode: Seg6Mode,
    steering: Vec<Steering>,
    index: u32,
    loopback: u32,
    link_mtu: u32,
    mac: MacAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// The peer at this underlay address.
    Peer(IpAddr),
    /// Peers whose subnets lie here.
    Overlay(Prefix),
}

impl Rules {
    pub(super) fn new(
        plan: &Seg6Plan,
        config: &NetworkConfig,
        index: u32,
        loopback: u32,
        link_mtu: u32,
        mac: MacAddr,
    ) -> Result<Self> {
        ensure!(
            config.backend.kind.as_deref() == Some(KIND),
            "the network's backend is {}, and the kernel's SRv6 has to do with {KIND} only",
            config.backend.kind.as_deref().unwrap_or("not named")
        );
        let object = Object::parse(&config.backend.json, LARGEST_JSON)?;
        let block = object
            .parsed("Block", "must be an IPv6 prefix in quotes")?
            .map_or_else(|| BLOCK.parse(), Ok)?;
        let locator = locator(block, plan.v4)?;
        if let Some(len) = object.uint("LocatorLen")? {
            ensure!(
                len == u32::from(locator.len()),
                "a kernel node's locator is {locator}, of its IPv4 address, and LocatorLen {len} another"
            );
        }
        let configured = match object.string("Mode")?.as_deref() {
            None | Some("reduced") => Seg6Mode::EncapRed,
            Some("full") => Seg6Mode::Encap,
            Some(other) => anyhow::bail!("Mode {other:?} is neither reduced nor full"),
        };
        let mode = match plan.form {
            Form::Seg6 | Form::CrossConnect { .. } => plan.mode.unwrap_or(configured),
            Form::ProofOfConcept => Seg6Mode::Encap,
        };
        let steering = object.raw("Paths").map(Steering::parse).transpose()?;
        let mut steering = steering.unwrap_or_default();
        // Who is the first waypoint does not send packets to itself.
        steering.retain(|steering| {
            steering
                .via
                .first()
                .is_some_and(|&first| !locator.contains(first))
        });
        Ok(Self {
            form: plan.form,
            block,
            locator,
            mode,
            steering,
            index,
            loopback,
            link_mtu: object.uint("MTU")?.filter(|&mtu| mtu > 0).unwrap_or(link_mtu),
            mac,
        })
    }

    pub(super) fn sid(&self, function: u128) -> Ipv6Addr {
        within(self.locator, function)
    }

    /// What the lease says.
    pub(super) fn attrs(&self, plan: &Seg6Plan, config: &NetworkConfig) -> LeaseAttrs {
        let mac = BASE64.encode(self.mac.octets());
        let (public_ipv6, data) = match self.form {
            Form::Seg6 | Form::CrossConnect { .. } => {
                let sid =
                    |function, behavior: &str| json!({ "SID": self.sid(function), "Behavior": behavior });
                let for_v6 = match self.form {
                    Form::CrossConnect { .. } => sid(DX6, "End.DX6"),
                    Form::Seg6 | Form::ProofOfConcept => sid(DT6, "End.DT6"),
                };
                let data = json!({
                    "Version": 1,
                    "Locator": self.locator.to_string(),
                    "Source": self.sid(SOURCE),
                    "SIDs": [sid(DX4, "End.DX4"), for_v6, sid(END, "End")],
                    "MACAddr": mac,
                });
                (Some(plan.v6), data.to_string())
            }
            Form::ProofOfConcept => (None, json!({ "MACAddr": mac }).to_string()),
        };
        let has_v6 = config.v6.is_some() && self.form != Form::ProofOfConcept;
        LeaseAttrs {
            public_ip: plan.v4,
            public_ipv6,
            backend_type: KIND.to_owned(),
            backend_v6_data: has_v6.then(|| data.clone()),
            backend_data: Some(data),
        }
    }

    /// What the node needs of itself.
    pub(super) fn own(&self, pods: &[IpAddr]) -> Vec<Item> {
        let dx4 = Behavior::EndDx4(Ipv4Addr::UNSPECIFIED);
        let sid = |function, behavior| Item::Sid(Sid::new(self.sid(function), self.index, behavior));
        match self.form {
            Form::Seg6 => {
                let dt6 = Behavior::EndDt6 {
                    table: Behavior::MAIN,
                };
                let mut items = vec![
                    Item::Blackhole(self.locator),
                    sid(SOURCE, dx4),
                    sid(DX4, dx4),
                    sid(DT6, dt6),
                    sid(END, Behavior::End),
                ];
                for pod in pods {
                    if let &IpAddr::V6(pod) = pod {
                        items.push(Item::Local(self.loopback, pod));
                    }
                }
                items
            }
            Form::CrossConnect { v4, v6 } => vec![
                Item::Blackhole(self.locator),
                sid(SOURCE, Behavior::EndDx4(v4)),
                sid(DX4, Behavior::EndDx4(v4)),
                sid(DX6, Behavior::EndDx6(v6)),
                sid(END, Behavior::End),
            ],
            Form::ProofOfConcept => vec![
                Item::Route(Route::direct(self.block.into(), self.index)),
                Item::Neighbour(self.index, self.sid(SOURCE), self.mac),
                sid(SOURCE, dx4),
            ],
        }
    }

    /// What a peer's lease asks for; nothing if it cannot be reached.
    pub(super) fn towards(&self, lease: &Lease) -> Vec<Item> {
        let Some(peer) = Published::read(&lease.attrs) else {
            return Vec::new();
        };
        let attrs = &lease.attrs;
        // Where a proof of concept looks for a peer's segment, and has its own.
        let mapped = locator(self.block, attrs.public_ip).map(|locator| within(locator, SOURCE));
        let mut items = Vec::new();
        let mut reach = |prefix, last| {
            let via = self.waypoints(attrs, prefix);
            let segments: Vec<_> = via.iter().copied().chain([last]).collect();
            let overhead = self.mode.overhead_bytes(segments.len());
            let fits = self.link_mtu.saturating_sub(overhead);
            let inner_mtu_bytes = match self.form {
                Form::Seg6 | Form::CrossConnect { .. } => Some(fits),
                Form::ProofOfConcept => None,
            };
            items.push(Item::Encap(Seg6Route {
                destination: prefix,
                index: self.index,
                mode: self.mode,
                segments,
                inner_mtu_bytes,
            }));
        };
        match (self.form, peer, mapped, attrs.public_ipv6) {
            (
                Form::Seg6 | Form::CrossConnect { .. },
                Published::Segments { locator, sids, .. },
                _,
                Some(via),
            ) => {
                for prefix in lease.subnet.prefixes() {
                    if let Some(sid) = decapsulating(&sids, prefix) {
                        reach(prefix, sid);
                    }
                }
                let mut route = Route::direct(locator.into(), self.index);
                route.gateway = Gateway::Via(via.into());
                items.insert(0, Item::Route(route));
            }
            (Form::Seg6 | Form::CrossConnect { .. }, Published::Neighbour(mac), Ok(sid), _) => {
                reach(lease.subnet.v4.into(), sid);
                let route = Route::direct(Prefix::host(sid.into()), self.index);
                items.insert(0, Item::Neighbour(self.index, sid, mac));
                items.insert(0, Item::Route(route));
            }
            (
                Form::ProofOfConcept,
                Published::Segments { mac: Some(mac), .. } | Published::Neighbour(mac),
                Ok(sid),
                _,
            ) => {
                reach(lease.subnet.v4.into(), sid);
                items.insert(0, Item::Neighbour(self.index, sid, mac));
            }
            (Form::Seg6 | Form::CrossConnect { .. } | Form::ProofOfConcept, _, _, _) => {}
        }
        items
    }

    fn waypoints(&self, attrs: &LeaseAttrs, prefix: Prefix) -> &[Ipv6Addr] {
        if self.form == Form::ProofOfConcept {
            return &[];
        }
        let leads = |steering: &&Steering| match steering.to {
            Target::Peer(IpAddr::V4(addr)) => attrs.public_ip == addr,
            Target::Peer(IpAddr::V6(addr)) => attrs.public_ipv6 == Some(addr),
            Target::Overlay(overlay) => overlay.covers(prefix),
        };
        self.steering
            .iter()
            .find(leads)
            .map_or(&[], |steering| steering.via.as_slice())
    }
}

/// Segments that packets to some peers go through first.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Steering {
    to: Target,
    via: Vec<Ipv6Addr>,
}

impl Steering {
    /// Reads the config's `Paths`.
    fn parse(json: &str) -> Result<Vec<Self>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Entry {
            to: String,
            via: Vec<Ipv6Addr>,
        }
        let entries: Vec<Entry> = serde_json::from_str(json).context("Paths cannot be read")?;
        let read = |entry: Entry| {
            let to = entry
                .to
                .parse()
                .map(Target::Peer)
                .or_else(|_| entry.to.parse().map(|prefix| Target::Overlay(Prefix::V4(prefix))))
                .or_else(|_| entry.to.parse().map(|prefix| Target::Overlay(Prefix::V6(prefix))))
                .with_context(|| format!("Paths: {:?} is neither address nor prefix", entry.to))?;
            Ok(Self { to, via: entry.via })
        };
        entries.into_iter().map(read).collect()
    }
}

/// What a peer's lease says of how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Published {
    /// Its segments, and the prefix they are from.
    Segments {
        locator: Ipv6Prefix,
        sids: Vec<Segment>,
        mac: Option<MacAddr>,
    },
    /// Its Ethernet address alone, as a proof of concept publishes it.
    Neighbour(MacAddr),
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Segment {
    #[serde(rename = "SID")]
    sid: Ipv6Addr,
    #[serde(rename = "Behavior")]
    behavior: String,
}

impl Published {
    /// `None` if the peer speaks no SRv6, or its data cannot be read.
    fn read(attrs: &LeaseAttrs) -> Option<Self> {
        if attrs.backend_type != KIND {
            return None;
        }
        let data = attrs.backend_data.as_ref().or(attrs.backend_v6_data.as_ref())?;
        let object = Object::parse(data, LARGEST_JSON).ok()?;
        let mac = object
            .string("MACAddr")
            .ok()?
            .and_then(|text| BASE64.decode(text).ok())
            .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
            .map(MacAddr::from);
        let Some(sids) = object.raw("SIDs") else {
            return mac.map(Self::Neighbour);
        };
        Some(Self::Segments {
            locator: object.parsed("Locator", "must be an IPv6 prefix").ok()??,
            sids: serde_json::from_str(sids).ok()?,
            mac,
        })
    }
}

/// A peer's segment for packets to `prefix`.
fn decapsulating(sids: &[Segment], prefix: Prefix) -> Option<Ipv6Addr> {
    let behaviors = match prefix {
        Prefix::V4(_) => ["End.DT46", "End.DT4", "End.DX4"],
        Prefix::V6(_) => ["End.DT46", "End.DT6", "End.DX6"],
    };
    let find = |behavior| sids.iter().find(|segment| segment.behavior == behavior);
    behaviors.into_iter().find_map(find).map(|segment| segment.sid)
}

/// The locator of the node at an underlay address: the address behind the block.
///
/// # Errors
/// The block leaves no room for an IPv4 address and a segment's own part.
pub fn locator(block: Ipv6Prefix, node: Ipv4Addr) -> Result<Ipv6Prefix> {
    let len = block.len() + 32;
    ensure!(
        len <= 120,
        "{block} is no block for locators made of IPv4 addresses"
    );
    let node = u128::from(node.to_bits()) << (128 - len);
    Ok(Ipv6Prefix::new(
        Ipv6Addr::from_bits(block.addr().to_bits() | node),
        len,
    )?)
}

/// The segment of the node at an underlay address that sends packets on, in a network whose config names no block.
///
/// # Errors
/// None in practice: the block is a constant.
pub fn default_end_sid(node: Ipv4Addr) -> Result<Ipv6Addr> {
    Ok(within(locator(BLOCK.parse()?, node)?, END))
}

fn within(locator: Ipv6Prefix, function: u128) -> Ipv6Addr {
    Ipv6Addr::from_bits(locator.addr().to_bits() | function)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Expiration;
    use crate::options::StoreKind;

    const KERSEY: &str = r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8:1::1","BackendType":"srv6","BackendData":
        {"Version":1,"Locator":"fd12:3456:789a:c000:201::/80","Source":"fd12:3456:789a:c000:201::1","SIDs":[
        {"SID":"fd12:3456:789a:c000:201::e","Behavior":"End"},
        {"SID":"fd12:3456:789a:c000:201::1","Behavior":"End.DT46"}],"ECN":true,"MACAddr":"AgAAAAoB"}}"#;
    const SEG6: &str = r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8:1::1","BackendType":"srv6","BackendData":
        {"Version":1,"Locator":"fd12:3456:789a:c000:201::/80","SIDs":[
        {"SID":"fd12:3456:789a:c000:201::4","Behavior":"End.DX4"},
        {"SID":"fd12:3456:789a:c000:201::6","Behavior":"End.DT6"}]}}"#;
    const OLD: &str = r#"{"PublicIP":"192.0.2.1","BackendType":"srv6","BackendData":{"MACAddr":"AgAAAAoB"}}"#;

    #[test]
    fn each_family_goes_to_a_segment_that_takes_it() {
        let rules = rules(Form::Seg6, r#"{"Type":"srv6"}"#);
        for (what, peer, expected) in [
            ("one for both", KERSEY, vec!["[201::1] 1460", "[201::1] 1460"]),
            ("one for each", SEG6, vec!["[201::4] 1460", "[201::6] 1460"]),
            ("an old one, IPv4 only", OLD, vec!["[201::1] 1460"]),
        ] {
            assert_eq!(encaps(&rules.towards(&lease(peer))), expected, "{what}");
        }
        for bad in [
            SEG6.replace("srv6", "vxlan"),
            SEG6.replace("/80", "/800"),
            SEG6.replace(r#""PublicIPv6":"2001:db8:1::1","#, ""),
            OLD.replace("AgAAAAoB", "02:00:00:00:0a:01"),
        ] {
            assert_eq!(rules.towards(&lease(&bad)), [], "{bad}");
        }
    }

    #[test]
    fn a_locator_is_reached_by_a_router_and_an_old_peer_by_its_ethernet_address() {
        let rules = rules(Form::Seg6, r#"{"Type":"srv6"}"#);
        let items = rules.towards(&lease(KERSEY));
        let Some(Item::Route(route)) = items.first() else {
            panic!("{items:?}");
        };
        assert_eq!(route.destination.to_string(), "fd12:3456:789a:c000:201::/80");
        assert_eq!(route.gateway, Gateway::Via("2001:db8:1::1".parse().unwrap()));

        let sid: Ipv6Addr = "fd12:3456:789a:c000:201::1".parse().unwrap();
        let mac = MacAddr::from([2, 0, 0, 0, 0x0a, 1]);
        let items = rules.towards(&lease(OLD));
        assert_eq!(items[1], Item::Neighbour(7, sid, mac));
    }

    #[test]
    fn a_proof_of_concept_looks_at_addresses_only() {
        let rules = rules(Form::ProofOfConcept, r#"{"Type":"srv6","Mode":"reduced"}"#);
        for peer in [KERSEY, OLD] {
            let items = rules.towards(&lease(peer));
            assert_eq!(encaps(&items), ["[201::1] -"], "{peer}");
            assert_eq!(items.len(), 2, "{peer}");
        }
        assert_eq!(rules.towards(&lease(SEG6)), [], "there is no Ethernet address");
        let attrs = rules.attrs(&plan(Form::ProofOfConcept), &config(r#"{"Type":"srv6"}"#));
        assert_eq!(attrs.backend_data.unwrap(), r#"{"MACAddr":"AgAAAAAJ"}"#);
        assert_eq!((attrs.public_ipv6, attrs.backend_v6_data), (None, None));
    }

    #[test]
    fn paths_lead_through_waypoints_except_from_there() {
        let paths = |to: &str, via: &str| {
            format!(
                r#"{{"Type":"srv6","Mode":"full","Paths":[{{"To":"{to}","Via":["fd12:3456:789a:c000:2{via}::e"]}}]}}"#
            )
        };
        let through = ["[203::e, 201::1] 1420", "[203::e, 201::1] 1420"];
        let straight = ["[201::1] 1436", "[201::1] 1436"];
        for (to, via, expected) in [
            ("192.0.2.1", "03", through),
            ("2001:db8:1::1", "03", through),
            ("10.244.0.0/16", "03", [through[0], straight[1]]),
            ("fd00:10:244:1::/64", "03", [straight[0], through[1]]),
            ("192.0.2.7", "03", straight),
            ("192.0.2.1", "09", straight),
        ] {
            let rules = rules(Form::Seg6, &paths(to, via));
            assert_eq!(encaps(&rules.towards(&lease(KERSEY))), expected, "{to} {via}");
        }
    }

    #[test]
    fn what_a_node_publishes_it_reads_as_a_peer() {
        let rules = rules(Form::Seg6, r#"{"Type":"srv6"}"#);
        let attrs = rules.attrs(&plan(Form::Seg6), &config(r#"{"Type":"srv6"}"#));
        assert_eq!(attrs.backend_data, attrs.backend_v6_data);
        let published = Published::read(&attrs).unwrap();
        let Published::Segments { locator, sids, mac } = published else {
            panic!("{published:?}");
        };
        assert_eq!((locator, mac), (rules.locator, Some(rules.mac)));
        let sids: Vec<_> = sids
            .iter()
            .map(|sid| format!("{} {}", sid.sid, sid.behavior))
            .collect();
        assert_eq!(
            sids,
            [
                "fd12:3456:789a:c000:209::4 End.DX4",
                "fd12:3456:789a:c000:209::6 End.DT6",
                "fd12:3456:789a:c000:209::e End",
            ]
        );
        assert_eq!(default_end_sid(plan(Form::Seg6).v4).unwrap(), rules.sid(END));
    }

    #[test]
    fn a_router_behind_a_node_gets_both_families() {
        let form = Form::CrossConnect {
            v4: [198, 51, 100, 2].into(),
            v6: "2001:db8:dc::2".parse().unwrap(),
        };
        let rules = rules(form, r#"{"Type":"srv6"}"#);
        let attrs = rules.attrs(&plan(form), &config(r#"{"Type":"srv6"}"#));
        let Some(Published::Segments { sids, .. }) = Published::read(&attrs) else {
            panic!("{attrs:?}");
        };
        let own = rules.own(&[]);
        let prefixes: Vec<_> = lease(KERSEY).subnet.prefixes().collect();
        for (prefix, behavior) in [
            (prefixes[0], Behavior::EndDx4([198, 51, 100, 2].into())),
            (prefixes[1], Behavior::EndDx6("2001:db8:dc::2".parse().unwrap())),
        ] {
            let published = decapsulating(&sids, prefix).unwrap();
            let sid = Item::Sid(Sid::new(published, 7, behavior));
            assert!(own.contains(&sid), "{sid:?} is not among {own:?}");
        }
    }

    #[test]
    fn a_config_that_cannot_be_followed_is_refused() {
        for bad in [
            r#"{"Type":"vxlan"}"#,
            r#"{"Type":"srv6","Block":"fd00::/100"}"#,
            r#"{"Type":"srv6","LocatorLen":64}"#,
            r#"{"Type":"srv6","Mode":"inline"}"#,
            r#"{"Type":"srv6","Paths":[{"To":"node 1","Via":[]}]}"#,
        ] {
            assert!(read(Form::Seg6, bad).is_err(), "{bad}");
        }
        let other = r#"{"Type":"srv6","Block":"fd45::/32","LocatorLen":64,"MTU":1400}"#;
        let other = read(Form::Seg6, other).unwrap();
        assert_eq!(other.locator.to_string(), "fd45:0:c000:209::/64");
        assert_eq!(encaps(&other.towards(&lease(SEG6)))[0], "[201::4] 1360");
    }

    /// Segment lists, without what is alike in all of them, and inner MTUs.
    fn encaps(items: &[Item]) -> Vec<String> {
        let show = |item: &Item| {
            let Item::Encap(route) = item else {
                return None;
            };
            let segments: Vec<_> = route
                .segments
                .iter()
                .map(|segment| segment.to_string().replace("fd12:3456:789a:c000:", ""))
                .collect();
            let mtu = route.inner_mtu_bytes;
            let mtu = mtu.map_or_else(|| "-".to_owned(), |mtu| mtu.to_string());
            Some(format!("[{}] {mtu}", segments.join(", ")))
        };
        items.iter().filter_map(show).collect()
    }

    fn rules(form: Form, backend: &str) -> Rules {
        read(form, backend).unwrap()
    }

    fn read(form: Form, backend: &str) -> Result<Rules> {
        let mac = MacAddr::from([2, 0, 0, 0, 0, 9]);
        Rules::new(&plan(form), &config(backend), 7, 1, 1500, mac)
    }

    fn config(backend: &str) -> NetworkConfig {
        let text = format!(
            r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{backend}}}"#
        );
        NetworkConfig::parse(&text).unwrap()
    }

    fn plan(form: Form) -> Seg6Plan {
        Seg6Plan {
            store: StoreKind::Remote(crate::options::RemoteOptions::plain(Vec::new())),
            interface: "eth0".to_owned(),
            v4: [192, 0, 2, 9].into(),
            v6: "2001:db8:1::9".parse().unwrap(),
            form,
            mode: None,
            subnet: None,
        }
    }

    fn lease(attrs: &str) -> Lease {
        Lease {
            subnet: "10.244.1.0-24&fd00:10:244:1::-64".parse().unwrap(),
            attrs: LeaseAttrs::from_json(attrs.as_bytes()).unwrap(),
            expiration: Expiration::Never,
            created: None,
        }
    }
}
