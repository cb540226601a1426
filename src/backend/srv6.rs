//! The `srv6` backend in userspace: IPv4 and IPv6 in IPv6 with a segment routing header (RFC 8986 §5, RFC 8754).
//!
//! ```text
//! | outer IPv6 40 | SRH 8 + 16 a segment, none for a path of one | inner IPv4 or IPv6 |
//! ```
//!
//! # Addresses
//!
//! A node has a *locator*, a prefix inside the network's `Block`, and SIDs in it: `locator::1` ends the tunnel (End.DT46) and is the source
//! of what the node sends, `locator::e` is a waypoint (End). Where 32 bits stand between `Block` and locator, they are the node's public
//! IPv4 address, which is what flannel-srv6, the proof of concept, does; else, or without such an address, the number of the node's subnet in
//! its network. The underlay routes locators to nodes; on one link Kersey makes those routes itself.
//!
//! # Lease data
//!
//! ```json
//! {"Version":1,"MACAddr":"AgAAAAoB","Locator":"fd12:3456:789a:c000:201::/80","Source":"fd12:3456:789a:c000:201::1",
//!  "SIDs":[{"SID":"fd12:3456:789a:c000:201::1","Behavior":"End.DT46"}],"ECN":true}
//! ```
//!
//! `ECN` says that the node merges congestion marks (RFC 6040), which kernels do not. Fields that are not known are ignored. A lease with
//! `MACAddr` alone is the proof of concept's: one IPv4 SID at its known place, on the same link, reached by Ethernet address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use crate::addr::{AddrError, Ipv6Prefix, MacAddr, Mtu, Prefix};
use crate::backend::{
    Backend, BackendError, Carrier, LeaseData, Locator, Networks, OversizePolicy, Place, Underlay,
    Unreachable, settings,
};
use crate::dataplane::datagram::Envelope;
use crate::dataplane::endpoint::{
    Behavior, Domain, Flavors, HmacCheck, HmacPolicy, LocalSid, LocalSids, NodeSid, decapsulate,
};
use crate::dataplane::route::Hop;
use crate::dataplane::stats::DropReason;
use crate::dataplane::{EcnPolicy, Encap, Inner, Manners, Oversize, PeerOffloads, TtlPolicy};
use crate::lease::LeaseAttrs;
use crate::lease::json::JsonError;
use crate::wire::srv6::{CsidFormat, Encapsulation, HmacAlgorithm, HmacKey, Mode, Template, next_header};

/// The type in leases and configs.
const KIND: &str = "srv6";
/// Version of the lease data.
const VERSION: u32 = 1;
/// Where the proof of concept has its SIDs.
const DEFAULT_BLOCK: &str = "fd12:3456:789a::/48";
/// Bits of a node's number where it is an IPv4 address.
const ADDRESS_BITS: u8 = 32;
/// The function, in the last bits of a SID, that ends the tunnel.
const FUNCTION_DECAPSULATE: u128 = 1;
/// The function of a waypoint.
const FUNCTION_END: u128 = 0xe;
/// Bytes the proof of concept's kernel adds: IPv6 header and SRH of one segment.
const FULL_OVERHEAD: u16 = 64;

/// The encapsulation of one node.
#[derive(Clone, Debug)]
pub struct Srv6 {
    sids: Arc<LocalSids>,
    hmac: Arc<HmacPolicy>,
}

/// How one prefix of a peer is reached.
#[derive(Clone, Debug)]
pub struct Srv6Hop {
    endpoint: SocketAddr,
    source: Ipv6Addr,
    node: (Ipv4Addr, Option<Ipv6Addr>),
    ecn: EcnPolicy,
    mute: bool,
    template: Box<Template>,
    /// The segments after the first.
    stops: Box<[Ipv6Addr]>,
}

impl Hop for Srv6Hop {
    #[inline]
    fn endpoint(&self) -> SocketAddr {
        self.endpoint
    }

    #[inline]
    fn source(&self) -> IpAddr {
        self.source.into()
    }

    #[inline]
    fn is_node(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => self.node.0 == addr && !addr.is_unspecified(),
            IpAddr::V6(addr) => self.node.1 == Some(addr) || self.source == addr,
        }
    }
}

impl Encap for Srv6 {
    type Hop = Srv6Hop;

    #[inline]
    fn outbound(&self, hop: &Srv6Hop) -> Manners {
        Manners {
            ttl: TtlPolicy::Keep,
            ecn: hop.ecn,
            offloads: PeerOffloads::Kernel,
            mute: hop.mute,
        }
    }

    #[inline]
    fn inbound(&self) -> Manners {
        Manners {
            ttl: TtlPolicy::Keep,
            ecn: EcnPolicy::Carry,
            offloads: PeerOffloads::Kernel,
            mute: false,
        }
    }

    #[inline]
    fn header_len(&self, hop: &Srv6Hop) -> usize {
        hop.template.len()
    }

    #[inline]
    fn push(&self, hop: &Srv6Hop, inner: Inner, out: &mut [u8]) {
        // 0 is no label at all (RFC 6437 §2).
        let label = (inner.flow >> 12).max(1);
        hop.template.push(out, inner.len, inner.ecn as u8, label);
    }

    #[inline]
    fn pull(&self, envelope: &Envelope, datagram: &[u8]) -> Result<usize, DropReason> {
        let source = match envelope.from {
            SocketAddr::V6(from) => *from.ip(),
            SocketAddr::V4(_) => return Err(DropReason::UnknownPeer),
        };
        let (sids, hmac) = (&self.sids, &self.hmac);
        decapsulate(envelope.protocol, envelope.to, datagram, sids, hmac, source)
    }
}

/// What a node of its own has, beside the network's config.
#[derive(Clone, Debug, Default)]
pub struct Srv6Node {
    /// Its locator, if not the one that follows from its address or subnet.
    pub locator: Option<Ipv6Prefix>,
    /// Further SIDs.
    pub sids: Vec<NodeSid>,
    /// Keys for HMAC TLVs.
    pub keys: Vec<HmacKey>,
}

impl Srv6Node {
    /// Reads a file of keys for HMAC TLVs: a line each, `NUMBER sha256|sha1 SECRET`; `#` begins a comment.
    ///
    /// # Errors
    /// Names the line and what is wrong with it; never the secret.
    pub fn parse_keys(text: &str) -> Result<Vec<HmacKey>, KeyError> {
        let lines = (1..).zip(text.lines());
        let lines = lines.filter(|(_, line)| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
        lines
            .map(|(line, text)| {
                let wrong = |rule| KeyError { line, rule };
                let mut words = text.trim().splitn(3, char::is_whitespace);
                let number = words.next().and_then(|word| word.parse().ok());
                let number = number
                    .filter(|&number: &u32| number != 0)
                    .ok_or_else(|| wrong("begins with a key number from 1 to 4294967295"))?;
                let algorithm = match words.next() {
                    Some("sha256") => HmacAlgorithm::Sha256,
                    Some("sha1") => HmacAlgorithm::Sha1,
                    _ => return Err(wrong("has sha256 or sha1 after the number")),
                };
                let secret = words.next().map(str::trim).unwrap_or_default();
                HmacKey::new(number, algorithm, secret.as_bytes())
                    .map_err(|_| wrong("ends with a secret of 1 to 64 bytes"))
            })
            .collect()
    }
}

/// A line in a file of keys is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: a key {rule}")]
pub struct KeyError {
    line: usize,
    rule: &'static str,
}

/// A path through waypoints.
#[derive(Clone, Debug)]
struct Steered {
    to: Target,
    via: Vec<Ipv6Addr>,
}

/// Whom a path leads to.
#[derive(Clone, Copy, Debug)]
enum Target {
    Node(IpAddr),
    Prefix(Prefix),
}

/// This node's place in the network.
#[derive(Clone, Debug)]
struct Placed {
    locator: Ipv6Prefix,
    source: Ipv6Addr,
    mac: Option<MacAddr>,
    sids: Arc<LocalSids>,
}

/// The backend: what the network config says, and what this node is.
#[derive(Clone, Debug)]
pub struct Srv6Backend {
    block: Ipv6Prefix,
    locator_len: u8,
    mode: Mode,
    link_mtu: Option<Mtu>,
    domain: Vec<Ipv6Prefix>,
    paths: Vec<Steered>,
    hmac: Arc<HmacPolicy>,
    signs: Option<HmacKey>,
    node: Srv6Node,
    placed: Option<Placed>,
}

/// A path as the config says it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct PathSettings {
    to: String,
    via: Vec<Ipv6Addr>,
}

/// A node's part of its lease.
#[derive(Serialize, Deserialize)]
struct Data {
    #[serde(rename = "Version", default)]
    version: u32,
    #[serde(rename = "MACAddr", default, skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    #[serde(rename = "Locator", default, skip_serializing_if = "Option::is_none")]
    locator: Option<Ipv6Prefix>,
    #[serde(rename = "Source", default, skip_serializing_if = "Option::is_none")]
    source: Option<Ipv6Addr>,
    #[serde(rename = "SIDs", default, skip_serializing_if = "Vec::is_empty")]
    sids: Vec<SidData>,
    #[serde(rename = "ECN", default)]
    ecn: bool,
}

/// A SID in a lease. The behavior stays text: a peer may have ones we do not.
#[derive(Clone, Serialize, Deserialize)]
struct SidData {
    #[serde(rename = "SID")]
    sid: Ipv6Addr,
    #[serde(rename = "Behavior")]
    behavior: String,
}

impl Srv6Backend {
    /// Reads the network's `Backend` object.
    ///
    /// # Errors
    /// A field has the wrong type, or a value outside its range.
    pub fn parse(json: &str, node: Srv6Node) -> Result<Self, BackendError> {
        let object = settings(json)?;
        let wrong = |name, value: &str, rule| BackendError::Settings(JsonError::field(name, value, rule));
        let block: Ipv6Prefix = match object.parsed("Block", "an IPv6 prefix in quotes")? {
            Some(block) => block,
            None => DEFAULT_BLOCK
                .parse()
                .map_err(|_| wrong("Block", DEFAULT_BLOCK, "an IPv6 prefix in quotes"))?,
        };
        let locator_len = object
            .uint("LocatorLen")?
            .unwrap_or(u32::from(block.len() + ADDRESS_BITS));
        let locator_len = u8::try_from(locator_len)
            .ok()
            .filter(|&len| len > block.len() && len <= 112)
            .ok_or_else(|| {
                let rule = "longer than Block's, and at most 112: a SID needs 16 bits for its function";
                wrong("LocatorLen", &locator_len.to_string(), rule)
            })?;
        let mode = match object.string("Mode")?.as_deref() {
            None | Some("" | "reduced") => Mode::Reduced,
            Some("full") => Mode::Full,
            Some(other) => return Err(wrong("Mode", other, "\"reduced\" or \"full\"")),
        };
        let link_mtu = match object.uint("MTU")? {
            None | Some(0) => None,
            Some(bytes) => Some(Mtu::new(bytes).map_err(|_| BackendError::Mtu(bytes))?),
        };
        let domain = match object.raw("Domain") {
            None => Vec::new(),
            Some(raw) => serde_json::from_str::<Vec<Ipv6Prefix>>(raw)
                .map_err(|_| wrong("Domain", raw, "a list of IPv6 prefixes"))?,
        };
        let paths = match object.raw("Paths") {
            None => Vec::new(),
            Some(raw) => serde_json::from_str::<Vec<PathSettings>>(raw)
                .ok()
                .and_then(|paths| paths.into_iter().map(Steered::new).collect())
                .ok_or_else(|| {
                    let rule = "a list of objects with \"To\", a node's public address or a prefix of the overlay, and \"Via\", 1 to 8 SIDs";
                    wrong("Paths", raw, rule)
                })?,
        };
        let check = match object.string("HMAC")?.as_deref() {
            Some("ignore") => HmacCheck::Ignore,
            None | Some("" | "verify") => HmacCheck::IfPresent,
            Some("require") => HmacCheck::Require,
            Some(other) => return Err(wrong("HMAC", other, "\"ignore\", \"verify\" or \"require\"")),
        };
        let signs = match object.uint("HMACKeyID")?.filter(|&id| id != 0) {
            None => None,
            Some(id) => Some(
                node.keys
                    .iter()
                    .find(|key| key.id() == id)
                    .cloned()
                    .ok_or_else(|| {
                        let rule = "the number of a key in this node's --srv6-hmac-keys file";
                        wrong("HMACKeyID", &id.to_string(), rule)
                    })?,
            ),
        };
        Ok(Self {
            block,
            locator_len,
            mode,
            link_mtu,
            domain,
            paths,
            hmac: Arc::new(HmacPolicy::new(check, node.keys.iter().cloned())),
            signs,
            node,
            placed: None,
        })
    }

    /// The locator of a node with this public address and this subnet; none while neither tells.
    fn locator(&self, place: &Place) -> Result<Option<Ipv6Prefix>, BackendError> {
        if let Some(locator) = self.node.locator {
            let block = self.block;
            return if block.covers(locator) && locator.len() > block.len() {
                Ok(Some(locator))
            } else {
                Err(BackendError::LocatorElsewhere { locator, block })
            };
        }
        let bits = self.locator_len - self.block.len();
        let number = match (bits == ADDRESS_BITS, place.public_v4, place.subnet) {
            (true, Some(addr), _) => u128::from(addr.to_bits()),
            (_, _, None) => return Ok(None),
            (_, _, Some(number)) => number,
        };
        if bits < 128 && number >> bits != 0 {
            return Err(BackendError::LocatorLen { bits, number });
        }
        let addr = self.block.addr().to_bits() | number << (128 - self.locator_len);
        Ipv6Prefix::new(addr.into(), self.locator_len)
            .map(Some)
            .map_err(|_| BackendError::LocatorLen { bits, number })
    }

    /// Where the proof of concept has its SID: the node's IPv4 address behind the block.
    fn concept_sid(&self, addr: Ipv4Addr) -> Option<Ipv6Addr> {
        let free = 128u8.checked_sub(self.block.len() + ADDRESS_BITS)?;
        let number = u128::from(addr.to_bits()) << free;
        Some(Ipv6Addr::from(
            self.block.addr().to_bits() | number | FUNCTION_DECAPSULATE,
        ))
    }

    fn data(&self) -> Option<String> {
        let placed = self.placed.as_ref()?;
        // Peers take SIDs in the locator only; others are for those who are told of them.
        let told = placed
            .sids
            .iter()
            .filter(|(prefix, _)| placed.locator.covers(*prefix));
        let sids = told.map(|(prefix, sid)| SidData {
            sid: prefix.addr(),
            behavior: sid.behavior().to_string(),
        });
        let data = Data {
            version: VERSION,
            mac: placed.mac.map(|mac| BASE64.encode(mac.octets())),
            locator: Some(placed.locator),
            source: Some(placed.source),
            sids: sids.collect(),
            ecn: true,
        };
        serde_json::to_string(&data).ok()
    }

    /// What a peer's lease says, the proof of concept's spelt out.
    fn peer(&self, attrs: &LeaseAttrs) -> Result<PeerData, Unreachable> {
        if attrs.backend_type != KIND {
            return Err(Unreachable::OtherBackend(attrs.backend_type.clone()));
        }
        let text = attrs
            .backend_data
            .as_ref()
            .or(attrs.backend_v6_data.as_ref())
            .ok_or(Unreachable::NoData)?;
        let wrong = |name, value: &str, rule| Unreachable::Data(JsonError::field(name, value, rule));
        let data: Data = serde_json::from_str(text)
            .map_err(|_| wrong("BackendData", text, "srv6 lease data, see docs/srv6.md"))?;
        let mac = match &data.mac {
            None => None,
            Some(text) => Some(
                BASE64
                    .decode(text)
                    .ok()
                    .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
                    .map(MacAddr::from)
                    .ok_or_else(|| wrong("MACAddr", text, "six bytes in base64"))?,
            ),
        };
        if data.version == 0 && data.locator.is_none() {
            let sid = self.concept_sid(attrs.public_ip).ok_or(Unreachable::NoData)?;
            return Ok(PeerData {
                locator: Ipv6Prefix::new(sid, 128).map_err(|_| Unreachable::NoData)?,
                source: sid,
                sids: vec![SidData {
                    sid,
                    behavior: "End.DX4".to_owned(),
                }],
                ecn: EcnPolicy::Ignore,
                concept_mac: Some(mac.ok_or(Unreachable::NoData)?),
            });
        }
        let locator = data
            .locator
            .ok_or_else(|| wrong("Locator", "missing", "must be given"))?;
        let source = data
            .source
            .ok_or_else(|| wrong("Source", "missing", "must be given"))?;
        // What is claimed here must not be somebody else's: locators are held against each other, all else against its locator.
        if !self.block.covers(locator) || locator.len() <= self.block.len() {
            return Err(wrong(
                "Locator",
                &locator.to_string(),
                "must lie in the network's Block",
            ));
        }
        if !locator.contains(source) {
            return Err(wrong("Source", &source.to_string(), "must lie in the Locator"));
        }
        if let Some(sid) = data.sids.iter().find(|sid| !locator.contains(sid.sid)) {
            return Err(wrong("SID", &sid.sid.to_string(), "must lie in the Locator"));
        }
        Ok(PeerData {
            locator,
            source,
            sids: data.sids,
            ecn: if data.ecn {
                EcnPolicy::Carry
            } else {
                EcnPolicy::Ignore
            },
            concept_mac: None,
        })
    }

    /// The waypoints to a peer's prefix, without those that are this node.
    fn waypoints(&self, prefix: Prefix, attrs: &LeaseAttrs, own: &Placed) -> Vec<Ipv6Addr> {
        let steered = self.paths.iter().find(|path| match path.to {
            Target::Node(IpAddr::V4(addr)) => addr == attrs.public_ip,
            Target::Node(IpAddr::V6(addr)) => Some(addr) == attrs.public_ipv6,
            Target::Prefix(target) => target.covers(prefix),
        });
        let via = steered.map_or(&[][..], |path| &path.via);
        // A path that begins here begins at its next waypoint.
        via.iter()
            .skip_while(|sid| own.locator.contains(**sid))
            .copied()
            .collect()
    }
}

/// What is known of a peer.
struct PeerData {
    locator: Ipv6Prefix,
    source: Ipv6Addr,
    sids: Vec<SidData>,
    ecn: EcnPolicy,
    /// Its Ethernet address, if it is a proof of concept's node, which is reached by that alone.
    concept_mac: Option<MacAddr>,
}

impl Steered {
    fn new(settings: PathSettings) -> Option<Self> {
        let to = match settings.to.parse::<IpAddr>() {
            Ok(addr) => Target::Node(addr),
            Err(_) => {
                let v4 = settings.to.parse().map(Prefix::V4).ok();
                Target::Prefix(v4.or_else(|| settings.to.parse().map(Prefix::V6).ok())?)
            }
        };
        (1..=8).contains(&settings.via.len()).then_some(Self {
            to,
            via: settings.via,
        })
    }
}

impl Backend for Srv6Backend {
    type Encap = Srv6;

    fn name(&self) -> &'static str {
        KIND
    }

    fn encap(&self) -> Srv6 {
        let sids = self.placed.as_ref().map(|placed| Arc::clone(&placed.sids));
        Srv6 {
            sids: sids.unwrap_or_default(),
            hmac: Arc::clone(&self.hmac),
        }
    }

    fn carrier(&self) -> Carrier {
        let Some(placed) = &self.placed else {
            return Carrier::Raw {
                sids: Arc::default(),
                source: Ipv6Addr::UNSPECIFIED,
                domain: Domain::default(),
            };
        };
        let mut prefixes = vec![self.block];
        prefixes.extend(&self.domain);
        let domain = Domain {
            prefixes,
            hmac: (*self.hmac).clone(),
        };
        Carrier::Raw {
            sids: Arc::clone(&placed.sids),
            source: placed.source,
            domain,
        }
    }

    fn needs_v6(&self) -> bool {
        true
    }

    fn placed(mut self, place: &Place) -> Result<Self, BackendError> {
        self.placed = match self.locator(place)? {
            None => None,
            Some(locator) => {
                let sid = |function: u128| Ipv6Addr::from(locator.addr().to_bits() | function);
                let mut sids = Vec::new();
                for (function, behavior) in [
                    (FUNCTION_DECAPSULATE, Behavior::EndDt46),
                    (FUNCTION_END, Behavior::End),
                ] {
                    let prefix =
                        Ipv6Prefix::new(sid(function), Ipv6Prefix::BITS).map_err(BackendError::Addr)?;
                    let local = LocalSid::new(behavior, Flavors::default(), None, CsidFormat::F3216)?;
                    sids.push((prefix, local));
                }
                let mut locators = vec![locator];
                for NodeSid { prefix, sid } in &self.node.sids {
                    if !locators.iter().any(|locator| locator.covers(*prefix)) {
                        locators.push(*prefix);
                    }
                    sids.push((*prefix, *sid));
                }
                Some(Placed {
                    locator,
                    source: sid(FUNCTION_DECAPSULATE),
                    mac: place.mac,
                    sids: Arc::new(LocalSids::new(locators, sids)?),
                })
            }
        };
        Ok(self)
    }

    fn stops(&self, hop: &Srv6Hop) -> Vec<IpAddr> {
        hop.stops.iter().copied().map(IpAddr::V6).collect()
    }

    fn overhead(&self, hop: &Srv6Hop) -> u16 {
        let own = u16::try_from(hop.template.len()).unwrap_or(u16::MAX);
        // What comes back from a mute peer is as long as that peer makes it.
        if hop.mute { own.max(FULL_OVERHEAD) } else { own }
    }

    fn link_mtu(&self, interface: Mtu) -> Mtu {
        self.link_mtu.map_or(interface, |mtu| mtu.min(interface))
    }

    fn oversize(&self) -> OversizePolicy {
        OversizePolicy {
            v4: Oversize::Refuse,
            v6: Oversize::Refuse,
        }
    }

    fn lease_data(&self, networks: Networks) -> LeaseData {
        let data = self.data();
        LeaseData {
            kind: KIND,
            v4: data.clone().filter(|_| networks.v4),
            v6: data.filter(|_| networks.v6),
        }
    }

    fn inner_mtu(&self, link_mtu: Mtu, _underlay: Underlay) -> Result<Mtu, AddrError> {
        // The longest path counts: whatever fits it fits all, and nobody has to be told.
        let waypoints = self.paths.iter().map(|path| path.via.len()).chain([0]);
        let overheads = waypoints.filter_map(|waypoints| {
            let path = Encapsulation {
                mode: self.mode,
                source: Ipv6Addr::UNSPECIFIED,
                segments: &vec![Ipv6Addr::UNSPECIFIED; waypoints + 1],
                next_header: next_header::IPV4,
                hmac: self.signs.as_ref(),
            };
            // A path too long for any header is refused where it is used.
            u16::try_from(path.template().ok()?.len()).ok()
        });
        let overhead = overheads.max().unwrap_or(FULL_OVERHEAD);
        self.link_mtu.unwrap_or(link_mtu).minus(overhead)
    }

    fn hop(&self, prefix: Prefix, attrs: &LeaseAttrs, _underlay: Underlay) -> Result<Srv6Hop, Unreachable> {
        let own = self.placed.as_ref().ok_or(Unreachable::NoAddress)?;
        let peer = self.peer(attrs)?;
        let (next_header, behaviors) = match prefix {
            Prefix::V4(_) => (next_header::IPV4, ["End.DT46", "End.DT4", "End.DX4"]),
            Prefix::V6(_) => (next_header::IPV6, ["End.DT46", "End.DT6", "End.DX6"]),
        };
        let sid = behaviors
            .iter()
            .find_map(|wanted| peer.sids.iter().find(|sid| sid.behavior == *wanted))
            .ok_or(Unreachable::NoSid)?;
        let mut segments = self.waypoints(prefix, attrs, own);
        segments.push(sid.sid);
        let path = Encapsulation {
            mode: self.mode,
            source: own.source,
            segments: &segments,
            next_header,
            hmac: self.signs.as_ref(),
        };
        let template = path
            .template()
            .map_err(|error| Unreachable::Path(error.to_string()))?;
        let first = segments.first().copied().ok_or(Unreachable::NoSid)?;
        Ok(Srv6Hop {
            endpoint: SocketAddrV6::new(first, 0, 0, 0).into(),
            source: peer.source,
            node: (attrs.public_ip, attrs.public_ipv6),
            ecn: peer.ecn,
            mute: peer.concept_mac.is_some(),
            template: Box::new(template),
            stops: segments.get(1..).unwrap_or_default().into(),
        })
    }

    fn blocks(&self) -> Vec<Ipv6Prefix> {
        vec![self.block]
    }

    fn locator_of(&self, attrs: &LeaseAttrs) -> Option<Locator> {
        let peer = self.peer(attrs).ok()?;
        Some(Locator {
            prefix: peer.locator,
            gateway: attrs.public_ipv6.filter(|_| peer.concept_mac.is_none()),
            station: peer.concept_mac,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNDERLAY: Underlay = Underlay { v4: None, v6: None };

    fn place(public_v4: Option<[u8; 4]>, subnet: Option<u128>) -> Place {
        Place {
            mac: Some(MacAddr::from([2, 0, 0, 0, 0x0a, 1])),
            public_v4: public_v4.map(Ipv4Addr::from),
            subnet,
        }
    }

    fn backend(json: &str) -> Srv6Backend {
        let backend = Srv6Backend::parse(json, Srv6Node::default()).unwrap();
        backend.placed(&place(Some([192, 0, 2, 1]), Some(7))).unwrap()
    }

    fn attrs(data: &str) -> LeaseAttrs {
        let lease = format!(
            r#"{{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"srv6","BackendData":{data}}}"#
        );
        LeaseAttrs::from_json(lease.as_bytes()).unwrap()
    }

    fn v4() -> Prefix {
        Prefix::V4("10.244.2.0/24".parse().unwrap())
    }

    fn v6() -> Prefix {
        Prefix::V6("fd00:244:2::/64".parse().unwrap())
    }

    const KERSEY: &str = r#"{"Version":1,"Locator":"fd12:3456:789a:c000:202::/80","Source":"fd12:3456:789a:c000:202::1",
        "SIDs":[{"SID":"fd12:3456:789a:c000:202::1","Behavior":"End.DT46"}],"ECN":true,"Later":[1]}"#;
    const SEG6: &str = r#"{"Version":1,"Locator":"fd12:3456:789a:c000:202::/80","Source":"fd12:3456:789a:c000:202::1",
        "SIDs":[{"SID":"fd12:3456:789a:c000:202::9","Behavior":"End.B6"},{"SID":"fd12:3456:789a:c000:202::4","Behavior":"End.DX4"}]}"#;
    const CONCEPT: &str = r#"{"MACAddr":"AgAAAAoC"}"#;

    #[test]
    fn the_locator_follows_from_address_or_subnet() {
        for (config, place, expected) in [
            (
                "{}",
                place(Some([192, 0, 2, 1]), None),
                Some("fd12:3456:789a:c000:201::/80"),
            ),
            ("{}", place(None, None), None),
            ("{}", place(None, Some(3)), Some("fd12:3456:789a:0:3::/80")),
            (
                r#"{"Block":"fd00:5e6::/32","LocatorLen":48}"#,
                place(Some([192, 0, 2, 1]), Some(0x12)),
                Some("fd00:5e6:12::/48"),
            ),
        ] {
            let backend = Srv6Backend::parse(config, Srv6Node::default()).unwrap();
            let placed = backend.placed(&place).unwrap();
            let locator = placed.placed.map(|placed| placed.locator.to_string());
            assert_eq!(locator.as_deref(), expected, "{config} {place:?}");
        }
        let narrow = Srv6Backend::parse(r#"{"Block":"fd00::/48","LocatorLen":52}"#, Srv6Node::default());
        let error = narrow.unwrap().placed(&place(None, Some(16))).err().unwrap();
        assert!(error.to_string().contains("number 16"), "{error}");
    }

    #[test]
    fn a_lease_says_what_peers_need_and_the_proof_of_concept_too() {
        let data = backend("{}").lease_data(Networks { v4: true, v6: false });
        assert_eq!(
            data.v4.as_deref(),
            Some(
                r#"{"Version":1,"MACAddr":"AgAAAAoB","Locator":"fd12:3456:789a:c000:201::/80","Source":"fd12:3456:789a:c000:201::1","SIDs":[{"SID":"fd12:3456:789a:c000:201::1","Behavior":"End.DT46"},{"SID":"fd12:3456:789a:c000:201::e","Behavior":"End"}],"ECN":true}"#
            )
        );
        assert_eq!((data.kind, data.v6), ("srv6", None));
    }

    #[test]
    fn each_peer_is_reached_at_its_own_sid() {
        let backend = backend("{}");
        for (data, prefix, to, len, ecn, mute) in [
            (
                KERSEY,
                v4(),
                "fd12:3456:789a:c000:202::1",
                40,
                EcnPolicy::Carry,
                false,
            ),
            (
                KERSEY,
                v6(),
                "fd12:3456:789a:c000:202::1",
                40,
                EcnPolicy::Carry,
                false,
            ),
            (
                SEG6,
                v4(),
                "fd12:3456:789a:c000:202::4",
                40,
                EcnPolicy::Ignore,
                false,
            ),
            (
                CONCEPT,
                v4(),
                "fd12:3456:789a:c000:202::1",
                64,
                EcnPolicy::Ignore,
                true,
            ),
        ] {
            let hop = backend.hop(prefix, &attrs(data), UNDERLAY).unwrap();
            assert_eq!(hop.endpoint(), SocketAddr::new(to.parse().unwrap(), 0), "{data}");
            let source: IpAddr = "fd12:3456:789a:c000:202::1".parse().unwrap();
            assert_eq!((hop.source(), backend.overhead(&hop)), (source, len), "{data}");
            let manners = backend.encap().outbound(&hop);
            assert_eq!((manners.ecn, manners.mute), (ecn, mute), "{data}");
            assert!(hop.is_node([192, 0, 2, 2].into()) && !hop.is_node([192, 0, 2, 3].into()));
        }
        for (data, prefix) in [(SEG6, v6()), (CONCEPT, v6())] {
            let error = backend.hop(prefix, &attrs(data), UNDERLAY).err();
            assert_eq!(error, Some(Unreachable::NoSid), "{data}");
        }
    }

    #[test]
    fn peers_are_on_the_link_by_address_or_by_station() {
        let backend = backend("{}");
        let kersey = backend.locator_of(&attrs(KERSEY)).unwrap();
        assert_eq!(kersey.prefix.to_string(), "fd12:3456:789a:c000:202::/80");
        assert_eq!(
            (kersey.gateway, kersey.station),
            ("2001:db8::2".parse().ok(), None)
        );
        let concept = backend.locator_of(&attrs(CONCEPT)).unwrap();
        assert_eq!(concept.prefix.to_string(), "fd12:3456:789a:c000:202::1/128");
        let mac = MacAddr::from([2, 0, 0, 0, 0x0a, 2]);
        assert_eq!((concept.gateway, concept.station), (None, Some(mac)));
    }

    #[test]
    fn a_path_leads_through_its_waypoints_but_not_through_oneself() {
        let paths = r#"{"Paths":[
            {"To":"10.244.2.0/23","Via":["fd12:3456:789a:c000:201::e","fd12:3456:789a:c000:203::e"]},
            {"To":"2001:db8::2","Via":["fd12:3456:789a:c000:204::e","fd12:3456:789a:c000:205::e"]}]}"#;
        let backend = backend(paths);
        for (prefix, first, len) in [
            (v4(), "fd12:3456:789a:c000:203::e", 64),
            (v6(), "fd12:3456:789a:c000:204::e", 80),
        ] {
            let hop = backend.hop(prefix, &attrs(KERSEY), UNDERLAY).unwrap();
            assert_eq!(hop.endpoint().ip(), first.parse::<IpAddr>().unwrap(), "{prefix}");
            assert_eq!(backend.overhead(&hop), len, "{prefix}");
        }
        let link = Mtu::new(1500).unwrap();
        assert_eq!(backend.inner_mtu(link, UNDERLAY).unwrap().bytes(), 1420);
    }

    #[test]
    fn settings_and_leases_that_are_wrong_are_named() {
        for (json, named) in [
            (r#"{"Block":"fd00::"}"#, "Block"),
            (r#"{"Block":"fd00::/48","LocatorLen":48}"#, "LocatorLen"),
            (r#"{"LocatorLen":113}"#, "LocatorLen"),
            (r#"{"Mode":"inline"}"#, "Mode"),
            (r#"{"Domain":["here"]}"#, "Domain"),
            (r#"{"Paths":[{"To":"10.244.2.0/24"}]}"#, "Paths"),
            (r#"{"Paths":[{"To":"node 2","Via":["fd00::e"]}]}"#, "Paths"),
            (r#"{"HMAC":"maybe"}"#, "HMAC"),
            (r#"{"HMACKeyID":17}"#, "HMACKeyID"),
            (r#"{"MTU":40}"#, "MTU"),
        ] {
            let error = Srv6Backend::parse(json, Srv6Node::default()).err().unwrap();
            assert!(error.to_string().contains(named), "{json}: {error}");
        }
        let backend = backend("{}");
        for (data, named) in [
            (r#"{"MACAddr":"AgAA"}"#, "MACAddr"),
            (r#"{"Version":1}"#, "Locator"),
            (r#"{"Version":1,"Locator":"fd12:3456:789a:1::/64"}"#, "Source"),
            (r#"{"Version":1,"Locator":"fd00::"}"#, "BackendData"),
            (
                r#"{"Version":1,"Locator":"fd00::/64","Source":"fd00::1"}"#,
                "Locator",
            ),
            (
                r#"{"Version":1,"Locator":"fd12:3456:789a::/48","Source":"fd12:3456:789a::1"}"#,
                "Locator",
            ),
            (
                r#"{"Version":1,"Locator":"fd12:3456:789a:1::/64","Source":"fd12:3456:789a:2::1"}"#,
                "Source",
            ),
            (
                r#"{"Version":1,"Locator":"fd12:3456:789a:1::/64","Source":"fd12:3456:789a:1::1","SIDs":[{"SID":"ff02::1","Behavior":"End.DT46"}]}"#,
                "SID",
            ),
        ] {
            let error = backend.hop(v4(), &attrs(data), UNDERLAY).err().unwrap();
            assert!(error.to_string().contains(named), "{data}: {error}");
        }
    }

    #[test]
    fn keys_are_read_and_never_told() {
        let keys =
            Srv6Node::parse_keys("# ours\n17 sha256 test-secret-0123\n18\tsha1 another one\n").unwrap();
        assert_eq!(keys.iter().map(HmacKey::id).collect::<Vec<_>>(), [17, 18]);
        for (text, line) in [
            ("x sha256 s3cret", 1),
            ("\n1 md5 s3cret", 2),
            ("0 sha1 s3cret", 1),
            ("1 sha1", 1),
        ] {
            let error = Srv6Node::parse_keys(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("line {line}:")), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
