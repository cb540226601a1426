//! The same mutated VXLAN datagrams for a kernel's device and for Kersey: who lets through what.
//!
//! ```text
//!   node 1 192.0.2.1, .77 -- hub -- node 2 192.0.2.2: kersey run, flannel0   -- pod -- beyond     one network,
//!   node 1 192.0.2.1, .77 -- hub -- node 2 192.0.2.2: the kernel's flannel.1 -- pod -- beyond     and its twin
//! ```
//!
//! The twins have the same addresses, Ethernet addresses, subnets and routes, so that they can be sent the same bytes. Everything node 2
//! does not keep for itself it forwards to where the sniffer is: what arrives there has passed tunnel and IP layer. One case is sent at a
//! time, and behind it a mark whose arrival ends the case.
//!
//! Kersey must let through what the kernel lets through, byte for byte, and nothing else. [`Difference`] lists what may differ.
//!
//! Limits: outer headers are those of a socket (what is wrong there, UDP refuses in both); Kersey's offloads for super-packets are off.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use kersey::addr::{Ipv4Prefix, Ipv6Prefix, MacAddr, Prefix};
use kersey::host::netlink::{Gateway, Route};
use kersey::host::sysctl;
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::interrupt;
use kersey::lab::kernel_node::{self, Carrier, KernelNode, KernelPlan};
use kersey::lab::netns::Namespace;
use kersey::lab::topology::INTERFACE;
use kersey::lease::Subnet;
use kersey::options::{EtcdOptions, StoreKind};
use kersey::wire::ip::V4_LEN;
use socket2::SockRef;

use self::cases::{Case, HONEST, PAYLOADS, Place, Random, Sender, host_v4, host_v6};
use crate::overlay::{Blueprint, Overlay, PREFIX, READY, Underlay, figure, wait_for, within};
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

mod cases;

const PORT: u16 = 8472;
/// Cases, unless `KERSEY_SOAK_CASES` says otherwise.
const CASES: u64 = 20_000;
/// Where in the subnet what is sent goes: beyond node 2.
const FAR: u32 = 9;
/// Protocol of the marks, RFC 3692; and what begins their payload.
const MARK: u8 = 253;
const MAGIC: [u8; 8] = *b"the mark";

#[test]
#[ignore = "a soak: tens of thousands of cases, run by `make soak`"]
fn kersey_lets_through_what_a_kernel_does_but_for_the_differences_listed() {
    if !require_etcd("kersey_lets_through_what_a_kernel_does_but_for_the_differences_listed") {
        return;
    }
    let cases = number("KERSEY_SOAK_CASES").unwrap_or(CASES);
    let seed = number("KERSEY_SOAK_SEED").unwrap_or_else(rand::random);
    figure("differential: seed, cases", (seed, cases));
    for (nth, (tag, underlay)) in (0..).zip([("soak4", Underlay::V4Only), ("soak6", Underlay::V6Only)]) {
        let mut twins = Twins::start(tag, underlay);
        let mut random = Random(seed.wrapping_add(nth));
        let mut tally = Tally::default();
        for (kind, len) in (0..HONEST).flat_map(|kind| PAYLOADS.map(|len| (kind, len))) {
            let honest = Case {
                sender: Sender::Peer,
                ecn: 0,
                datagram: twins.place.frame(twins.place.honest(kind, &vec![0x5a; len])),
            };
            let verdict = twins.judge(&honest);
            assert_eq!(
                verdict,
                Ok(Verdict::Both),
                "kind {kind}, {len} bytes: {honest:02x?}"
            );
        }
        for case_nth in 0..cases / 2 {
            let case = twins.place.case(&mut random);
            let verdict = twins.judge(&case).unwrap_or_else(|wrong| {
                panic!("KERSEY_SOAK_SEED={seed}, {underlay:?}, case {case_nth}: {wrong}\n{case:02x?}")
            });
            *tally.entry(verdict).or_default() += 1;
        }
        figure(&format!("differential over {underlay:?}"), &tally);
        let status = twins.kersey.status(2);
        figure(
            &format!("differential over {underlay:?}: Kersey's counters"),
            &status.drops,
        );
        // Enough gets through for the comparison to mean something, and each difference is met.
        assert!(tally.get(&Verdict::Both).copied().unwrap_or(0) >= cases / 20);
        if cases >= CASES {
            for difference in Difference::ALL {
                assert!(
                    tally.contains_key(&Verdict::Differ(difference)),
                    "{difference:?} never occurred"
                );
            }
        }
        assert_eq!(status.counters["receive_overflows"], 0);
        assert_eq!(status.drops.get("device_refused"), None);
    }
}

/// In what Kersey may differ from a kernel's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Difference {
    /// Kersey ignores reserved bits of the VXLAN header, as RFC 7348 §5 asks; the kernel refuses them.
    ReservedBits,
    /// Kersey takes datagrams of peers alone.
    OuterSource,
    /// … and of a peer, packets from its own lease or its own underlay address.
    InnerSource,
    /// … for this node's own lease: it is no relay.
    InnerDestination,
    /// Kersey takes no VLAN tags; the kernel takes off a tag that is a priority only (VLAN 0).
    PriorityTag,
    /// Kersey walks IPv6 extension headers, and they must end within the packet and be 8 at the most; a kernel that forwards looks at
    /// hop-by-hop options alone.
    ExtensionHeaders,
}

impl Difference {
    const ALL: [Self; 6] = [
        Self::ReservedBits,
        Self::OuterSource,
        Self::InnerSource,
        Self::InnerDestination,
        Self::PriorityTag,
        Self::ExtensionHeaders,
    ];
}

/// What came of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    /// Both let the same bytes through.
    Both,
    /// Neither let anything through.
    Neither,
    /// One of them did, as it may.
    Differ(Difference),
}

type Tally = BTreeMap<Verdict, u64>;

/// Both networks.
struct Twins {
    place: Place,
    sides: [Side; 2],
    marks: u64,
    /// Before the network it lives in.
    _kernel: KernelNode,
    _twin: Overlay,
    kersey: Overlay,
}

impl Twins {
    fn start(tag: &str, underlay: Underlay) -> Self {
        let mut blueprint = Blueprint::new(tag, 2);
        blueprint.network = ClusterPlan::network("vxlan", true);
        blueprint.underlay = underlay;
        blueprint.lab.default_route = kersey::host::ethtool::Switch::Off;
        blueprint.flags = ["--tun-tso=off", "--tun-uso=off", "--queues=1"]
            .map(str::to_owned)
            .into();
        let mut twin = blueprint.clone();
        twin.lab.prefix += "-twin";
        twin.daemons = 0;
        let (mut kersey, twin) = (blueprint.start(), twin.build());

        // What both know of node 1 stays, and nothing but the test speaks for it.
        let leases = [1, 2].map(|nth| {
            let subnets = kersey.status(nth).node.subnets;
            let key = format!("subnets/{}", subnets.join("&").replace('/', "-"));
            let (value, _) = kersey.get(&key).unwrap();
            (subnets, key, value)
        });
        kersey.terminate(1);
        twin.put(&leases[0].1, leases[0].2.clone());
        let macs = [0, 1].map(|index| mac(&leases[index].2));
        let subnet = |index: usize| {
            let subnets: &Vec<String> = &leases[index].0;
            (
                subnets[0].parse::<Ipv4Prefix>().unwrap(),
                subnets[1].parse::<Ipv6Prefix>().unwrap(),
            )
        };
        let (peer, own) = (subnet(0), subnet(1));
        let node = &twin.lab.nodes[1];
        let plan = KernelPlan {
            store: StoreKind::Etcd(EtcdOptions {
                endpoints: vec![twin.etcd_place()],
                prefix: PREFIX.to_owned(),
                ca_file: None,
                client_cert: None,
                login: None,
            }),
            interface: INTERFACE.to_owned(),
            underlay: kernel_node::Underlay {
                v4: (underlay == Underlay::V4Only).then_some(node.v4),
                v6: (underlay == Underlay::V6Only).then_some(node.v6),
            },
            subnet: Some(Subnet {
                v4: own.0,
                v6: Some(own.1),
            }),
        };
        let mut kernel = KernelNode::join(&node.namespace, plan).unwrap();
        assert_eq!(kernel.subnets(), leases[1].0);
        let (carrier, from, stranger, to): (_, IpAddr, IpAddr, IpAddr) = match underlay {
            Underlay::V6Only => (
                Carrier::V6,
                twin.lab.nodes[0].v6.into(),
                "2001:db8:1::77".parse().unwrap(),
                node.v6.into(),
            ),
            Underlay::Both | Underlay::V4Only => (
                Carrier::V4,
                twin.lab.nodes[0].v4.into(),
                "192.0.2.77".parse().unwrap(),
                node.v4.into(),
            ),
        };
        kernel.set_mac(carrier, macs[1]).unwrap();
        kernel.follow(READY, |known| known.len() == 1).unwrap();
        let place = Place {
            macs: macs.map(MacAddr::octets),
            peer,
            own,
            from,
            nodes: (node.v4, node.v6),
        };
        let to = SocketAddr::new(to, PORT);
        let sides = [&kersey, &twin].map(|overlay| Side::new(overlay, (from, stranger), to, own));
        let mut twins = Self {
            place,
            sides,
            marks: 0,
            _kernel: kernel,
            _twin: twin,
            kersey,
        };
        // Links that were set up a moment ago may not carry yet.
        wait_for("a mark passes both", READY, || {
            twins.try_mark(Duration::from_millis(100)).is_ok()
        });
        twins
    }

    /// Sends a case to both and says what came of it, or what is wrong with that. What looks wrong is tried again with patience, in case
    /// a packet overtook a mark.
    fn judge(&mut self, case: &Case) -> Result<Verdict, String> {
        let mut verdict = self.compare(case, Duration::ZERO);
        for _ in 0..3 {
            if verdict.is_ok() {
                break;
            }
            verdict = self.compare(case, Duration::from_millis(50));
        }
        verdict
    }

    fn compare(&mut self, case: &Case, patience: Duration) -> Result<Verdict, String> {
        for side in &self.sides {
            side.send(case);
        }
        let mut seen = self.mark();
        if !patience.is_zero() {
            std::thread::sleep(patience);
            for (seen, more) in seen.iter_mut().zip(self.mark()) {
                seen.extend(more);
            }
        }
        let [kersey, kernel] = seen;
        let refusals = self.place.refusals(case);
        match (kersey.as_slice(), kernel.as_slice()) {
            ([], []) => Ok(Verdict::Neither),
            ([], [_]) => refusals
                .first()
                .map(|&difference| Verdict::Differ(difference))
                .ok_or_else(|| format!("only the kernel lets through {kernel:02x?}")),
            ([_], _) if !refusals.is_empty() => Err(format!("Kersey lets through in spite of {refusals:?}")),
            ([_], []) if has_reserved_bits(&case.datagram) => Ok(Verdict::Differ(Difference::ReservedBits)),
            ([_], []) => Err(format!("only Kersey lets through {kersey:02x?}")),
            ([one], [two]) if timeless(one) == timeless(two) => Ok(Verdict::Both),
            _ => Err(format!(
                "Kersey lets through {kersey:02x?}, the kernel {kernel:02x?}"
            )),
        }
    }

    /// Sends a mark to both, waits for it, and gives what came before it.
    fn mark(&mut self) -> [Vec<Vec<u8>>; 2] {
        let marked = self.try_mark(within(Duration::from_secs(5)));
        marked.unwrap_or_else(|who| panic!("a mark was lost at {who}"))
    }

    /// The same; gives the name of who has not let it through within `limit`.
    fn try_mark(&mut self, limit: Duration) -> Result<[Vec<Vec<u8>>; 2], &'static str> {
        self.marks += 1;
        let mut payload = MAGIC.to_vec();
        payload.extend(self.marks.to_be_bytes());
        let case = Case {
            sender: Sender::Peer,
            ecn: 0,
            datagram: self.place.frame(self.place.v4(MARK, &payload)),
        };
        let mut seen = [Vec::new(), Vec::new()];
        for side in &self.sides {
            side.send(&case);
        }
        for ((side, seen), who) in self.sides.iter().zip(&mut seen).zip(["Kersey", "the kernel"]) {
            let mut all = Vec::new();
            let mut arrived = || {
                all.extend(side.arrived());
                all.iter().any(|packet: &Vec<u8>| packet.ends_with(&payload))
            };
            // Most marks are back before the first look would be due.
            if !(0..2000).any(|_| arrived()) && !interrupt::wait_until(limit, &mut arrived) {
                return Err(who);
            }
            all.retain(|packet| packet.get(V4_LEN..V4_LEN + MAGIC.len()) != Some(&MAGIC));
            all.retain(|packet| !self.place.is_nodes_own(packet));
            *seen = all;
        }
        Ok(seen)
    }
}

/// One of the networks.
struct Side {
    peer: UdpSocket,
    stranger: UdpSocket,
    to: SocketAddr,
    sniffer: Sniffer,
    _beyond: Namespace,
}

impl Side {
    fn new(
        overlay: &Overlay,
        (from, stranger): (IpAddr, IpAddr),
        to: SocketAddr,
        own: (Ipv4Prefix, Ipv6Prefix),
    ) -> Self {
        let sender = overlay.namespace(1);
        let len = if stranger.is_ipv4() { 24 } else { 64 };
        sender
            .netlink(async |netlink| {
                let index = netlink.link(INTERFACE).await?.index;
                Ok(netlink.add_address(index, stranger, len).await?)
            })
            .unwrap();
        let beyond = beyond(overlay.namespace(2), own);
        let bind = |addr: IpAddr| {
            let mut bound = None;
            // An IPv6 address may not be used before it is known that nobody else has it.
            wait_for("the address is there", READY, || {
                bound = sender.run(|| Ok(UdpSocket::bind((addr, 0))?)).ok();
                bound.is_some()
            });
            bound.unwrap()
        };
        Self {
            peer: bind(from),
            stranger: bind(stranger),
            to,
            sniffer: Sniffer::start(&beyond, "eth0"),
            _beyond: beyond,
        }
    }

    fn send(&self, case: &Case) {
        let socket = match case.sender {
            Sender::Peer => &self.peer,
            Sender::Stranger => &self.stranger,
        };
        let options = SockRef::from(socket);
        if self.to.is_ipv4() {
            options.set_tos_v4(case.ecn).unwrap();
        } else {
            options.set_tclass_v6(case.ecn).unwrap();
        }
        assert_eq!(
            socket.send_to(&case.datagram, self.to).unwrap(),
            case.datagram.len()
        );
    }

    fn arrived(&self) -> Vec<Vec<u8>> {
        let packets = self.sniffer.packets().into_iter();
        packets
            .filter(|(way, _)| *way == Way::In)
            .map(|(_, packet)| packet)
            .collect()
    }
}

/// Makes a namespace behind `node` to which all goes that is not for the node itself: nobody there answers.
fn beyond(node: &Namespace, own: (Ipv4Prefix, Ipv6Prefix)) -> Namespace {
    let name = format!("{}-beyond", node.name());
    let namespace = Namespace::create(&name).unwrap();
    let far = namespace.open().unwrap();
    let station = [0x02, 0, 0, 0, 0, FAR as u8];
    for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        node.sysctl(switch, "1").unwrap();
    }
    namespace
        .run(|| Ok(sysctl::set("ipv6/conf/default/disable_ipv6", "1")?))
        .unwrap();
    node.netlink(async |netlink| {
        netlink.add_veth("pod", "eth0", Some(far.as_fd())).await?;
        let index = netlink.link("pod").await?.index;
        netlink.set_up(index).await?;
        let (v4, v6) = (|low| host_v4(own.0, low), |low| host_v6(own.1, low));
        netlink.add_address(index, v4(1).into(), own.0.len()).await?;
        netlink.add_address(index, v6(1).into(), own.1.len()).await?;
        for low in 3..255 {
            netlink.set_neighbour(index, v4(low).into(), station).await?;
            netlink.set_neighbour(index, v6(low).into(), station).await?;
        }
        let everywhere: [(Prefix, IpAddr); 2] = [
            (Ipv4Prefix::new(Ipv4Addr::UNSPECIFIED, 0)?.into(), v4(FAR).into()),
            (Ipv6Prefix::new(Ipv6Addr::UNSPECIFIED, 0)?.into(), v6(FAR).into()),
        ];
        for (prefix, gateway) in everywhere {
            let mut route = Route::direct(prefix, index);
            route.gateway = Gateway::Via(gateway);
            netlink.replace_route(&route).await?;
        }
        Ok(())
    })
    .unwrap();
    namespace
        .netlink(async |netlink| {
            let index = netlink.link("eth0").await?.index;
            netlink.set_mac(index, station).await?;
            Ok(netlink.set_up(index).await?)
        })
        .unwrap();
    namespace
}

/// Whether bits of the VXLAN header are set that RFC 7348 §5 reserves.
fn has_reserved_bits(datagram: &[u8]) -> bool {
    datagram
        .first_chunk::<8>()
        .is_some_and(|header| header[0] & !0x08 != 0 || header[1..4] != [0; 3] || header[7] != 0)
}

/// A packet without what the forwarding host writes the time into: IPv4 options that hold a timestamp (RFC 791 §3.1).
fn timeless(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let header_len = usize::from(packet[0] & 0xf) * 4;
    if packet[0] >> 4 == 4
        && let Some(options) = packet.get(V4_LEN..header_len)
        && options.contains(&68)
    {
        packet[V4_LEN..header_len].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// The Ethernet address a lease tells.
fn mac(lease: &str) -> MacAddr {
    let lease: serde_json::Value = serde_json::from_str(lease).unwrap();
    lease["BackendData"]["VtepMAC"].as_str().unwrap().parse().unwrap()
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|error| panic!("{variable}={text}: {error}")),
    )
}
