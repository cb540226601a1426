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

use etherparse::PacketBuilder;
use kersey::addr::{Ipv4Prefix, Ipv6Prefix, MacAddr, Prefix};
use kersey::host::netlink::{Gateway, Route};
use kersey::host::sysctl;
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::kernel_node::{self, Carrier, KernelNode, KernelPlan};
use kersey::lab::netns::Namespace;
use kersey::lab::topology::INTERFACE;
use kersey::lease::Subnet;
use kersey::options::{EtcdOptions, StoreKind};
use kersey::wire::checksum::Sum;
use kersey::wire::ip::{V4_LEN, V6_LEN};
use kersey::wire::vxlan::HEADERS_LEN;
use socket2::SockRef;

use crate::overlay::{Blueprint, Overlay, PREFIX, READY, Underlay, figure, wait_for, within};
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

const PORT: u16 = 8472;
/// Cases, unless `KERSEY_SOAK_CASES` says otherwise.
const CASES: u64 = 20_000;
/// Where in the subnet what is sent goes: beyond node 2.
const FAR: u32 = 9;
/// Protocol of the marks, RFC 3692; and what begins their payload.
const MARK: u8 = 253;
const MAGIC: [u8; 8] = *b"the mark";
/// Kinds of packets that mutation begins with, and sizes of their payload.
const HONEST: usize = 12;
const PAYLOADS: [usize; 4] = [8, 64, 900, 1300];
/// Offsets in the datagram.
const DST: usize = 8;
const SRC: usize = 14;
const TYPE: usize = 20;

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

/// What is sent to both.
#[derive(Clone, Debug)]
struct Case {
    sender: Sender,
    /// Congestion codepoint outside.
    ecn: u32,
    datagram: Vec<u8>,
}

/// Whose address it is sent from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sender {
    Peer,
    Stranger,
}

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
        twins.mark(READY);
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
        let mut seen = self.mark(within(Duration::from_secs(5)));
        if !patience.is_zero() {
            std::thread::sleep(patience);
            for (seen, more) in seen.iter_mut().zip(self.mark(within(Duration::from_secs(5)))) {
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
    fn mark(&mut self, limit: Duration) -> [Vec<Vec<u8>>; 2] {
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
            if !(0..2000).any(|_| arrived()) {
                wait_for(&format!("mark at {who}"), limit, &mut arrived);
            }
            all.retain(|packet| packet.get(V4_LEN..V4_LEN + MAGIC.len()) != Some(&MAGIC));
            all.retain(|packet| !self.place.is_nodes_own(packet));
            *seen = all;
        }
        seen
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

/// Addresses, the same in both networks.
struct Place {
    /// Of node 1's and node 2's devices.
    macs: [[u8; 6]; 2],
    /// Node 1's subnets.
    peer: (Ipv4Prefix, Ipv6Prefix),
    /// Node 2's.
    own: (Ipv4Prefix, Ipv6Prefix),
    /// Node 1 on the underlay.
    from: IpAddr,
    /// Node 2 on the underlay.
    nodes: (Ipv4Addr, Ipv6Addr),
}

impl Place {
    fn frame(&self, inner: Vec<u8>) -> Vec<u8> {
        let mut bytes = vec![0x08, 0, 0, 0, 0, 0, 1, 0];
        bytes.extend(self.macs[1]);
        bytes.extend(self.macs[0]);
        bytes.extend(if inner[0] >> 4 == 4 {
            [0x08, 0x00]
        } else {
            [0x86, 0xdd]
        });
        bytes.extend(inner);
        bytes
    }

    /// An honest IPv4 packet of any protocol.
    fn v4(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let (src, dst) = (host_v4(self.peer.0, 2), host_v4(self.own.0, FAR));
        let len = (V4_LEN + payload.len()) as u16;
        let mut packet = vec![0x45, 0];
        packet.extend(len.to_be_bytes());
        packet.extend([0x12, 0x34, 0x40, 0, 64, protocol, 0, 0]);
        packet.extend(src.octets());
        packet.extend(dst.octets());
        packet.extend(payload);
        sum_v4(&mut packet);
        packet
    }

    /// An honest IPv6 packet.
    fn v6(&self, next: u8, payload: &[u8]) -> Vec<u8> {
        let (src, dst) = (host_v6(self.peer.1, 2), host_v6(self.own.1, FAR));
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend((payload.len() as u16).to_be_bytes());
        packet.extend([next, 64]);
        packet.extend(src.octets());
        packet.extend(dst.octets());
        packet.extend(payload);
        packet
    }

    /// One of [`HONEST`] kinds of packets nothing is wrong with.
    fn honest(&self, kind: usize, bytes: &[u8]) -> Vec<u8> {
        let (src, dst) = (host_v4(self.peer.0, 2), host_v4(self.own.0, FAR));
        let v4 = PacketBuilder::ipv4(src.octets(), dst.octets(), 64);
        let (src, dst) = (host_v6(self.peer.1, 2), host_v6(self.own.1, FAR));
        let v6 = PacketBuilder::ipv6(src.octets(), dst.octets(), 64);
        let mut packet = Vec::new();
        let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
        match kind {
            0 => v4.udp(4000, 9).write(&mut packet, bytes).unwrap(),
            1 => v4.tcp(4000, 9, 7, 1000).write(&mut packet, bytes).unwrap(),
            2 => v4.icmpv4_echo_request(1, 2).write(&mut packet, bytes).unwrap(),
            3 => v6.udp(4000, 9).write(&mut packet, bytes).unwrap(),
            4 => v6.tcp(4000, 9, 7, 1000).write(&mut packet, bytes).unwrap(),
            5 => v6.icmpv6_echo_request(1, 2).write(&mut packet, bytes).unwrap(),
            // IPv4 options that do nothing, and a fragment.
            6 => {
                packet = self.v4(17, &[&[1, 1, 1, 0], bytes].concat());
                packet[0] = 0x46;
                sum_v4(&mut packet);
            }
            7 => {
                packet = self.v4(17, bytes);
                packet[6..8].copy_from_slice(&[0x20, 9]);
                sum_v4(&mut packet);
            }
            8 => packet = self.v4(4, &self.v4(17, bytes)),
            // Hop-by-hop and destination options, a fragment, nothing.
            9 => packet = self.v6(0, &[&[60], options, &[17], options, bytes].concat()),
            10 => packet = self.v6(44, &[&[17, 0, 0, 1, 0, 0, 0, 7], bytes].concat()),
            _ => packet = self.v6(59, &[]),
        }
        packet
    }

    /// Some honest packet with up to three things wrong.
    fn case(&self, random: &mut Random) -> Case {
        let payload = random.bytes(PAYLOADS);
        let mut inner = self.honest(random.below(HONEST), &payload);
        if random.below(4) == 0 {
            let codepoint = random.below(4) as u8;
            if inner[0] >> 4 == 4 {
                inner[1] = inner[1] & !3 | codepoint;
                sum_v4(&mut inner);
            } else {
                inner[1] = inner[1] & !0x30 | codepoint << 4;
            }
        }
        let mut datagram = self.frame(inner);
        for _ in 0..random.below(4) {
            self.mutate(&mut datagram, random);
        }
        // Most header checksums are right, so that what is behind them is reached.
        let at = if is_tagged(&datagram) {
            HEADERS_LEN + 4
        } else {
            HEADERS_LEN
        };
        if random.below(4) != 0
            && let Some(inner) = datagram.get_mut(at..)
        {
            sum_v4(inner);
        }
        Case {
            sender: match random.below(25) {
                0 => Sender::Stranger,
                _ => Sender::Peer,
            },
            ecn: match random.below(4) {
                0 => random.below(4) as u32,
                _ => 0,
            },
            datagram,
        }
    }

    fn mutate(&self, datagram: &mut Vec<u8>, random: &mut Random) {
        const INNER: usize = HEADERS_LEN;
        let v4 = datagram.get(INNER).is_some_and(|first| first >> 4 == 4);
        let front = datagram.len().min(INNER + V6_LEN + 24);
        let any = random.next() as u8;
        let value = random.pick([0, 1, 4, 6, 0x08, 0x45, 0x46, 0x60, 0x7f, 0x80, 0xff, any]);
        let stations = [
            [0xff; 6],
            [0; 6],
            [0x01, 0, 0x5e, 0, 0, 1],
            [0x33, 0x33, 0, 0, 0, 1],
            self.macs[0],
            self.macs[1],
        ];
        match random.below(16) {
            0 | 1 if front > 0 => datagram[random.below(front)] ^= 1 << random.below(8),
            2 if front > 0 => datagram[random.below(front)] = value,
            3 => datagram.truncate(random.below(front + 1)),
            4 => datagram.truncate(random.below(datagram.len() + 1)),
            5 => {
                let more = 1 + random.below(64);
                datagram.extend((0..more).map(|_| random.next() as u8));
            }
            // The length inside.
            6 => {
                let len = datagram.len().saturating_sub(INNER) as u16;
                let near = len.wrapping_add(random.below(9) as u16).wrapping_sub(4);
                let len = random.pick([0, 1, 20, 40, near, len.wrapping_sub(40), len + 1000, 0xffff]);
                put(datagram, INNER + if v4 { 2 } else { 4 }, &len.to_be_bytes());
            }
            7 => {
                let (at, mask) = random.pick([
                    (0, 0x08),
                    (0, 0x80),
                    (0, 0xf7),
                    (1, 0x40),
                    (2, 1),
                    (7, 1),
                    (7, 0x80),
                ]);
                if let Some(byte) = datagram.get_mut(at) {
                    *byte ^= mask;
                }
            }
            8 => put(
                datagram,
                4,
                &random.pick([[0, 0, 0], [0, 0, 2], [0, 1, 0], [1, 0, 0]]),
            ),
            9 => {
                let (at, station) = (random.pick([DST, SRC]), random.pick(stations));
                put(datagram, at, &station);
            }
            10 => {
                let kind: u16 = random.pick([0x0800, 0x86dd, 0x0806, 0x8847, 0x88cc, 0x0040, 0x6558]);
                put(datagram, TYPE, &kind.to_be_bytes());
            }
            11 if datagram.len() >= HEADERS_LEN => {
                let id = random.pick([0x00u8, 0x00, 0x05]);
                let tag = random.pick([
                    [0x81, 0x00, 0x00, id],
                    [0x81, 0x00, 0xe0, id],
                    [0x88, 0xa8, 0x00, id],
                ]);
                datagram.splice(TYPE..TYPE, tag);
            }
            12 => {
                let source = random.below(2) == 0;
                self.readdress(datagram, source, random);
            }
            // Protocol or next header: extension headers where none are.
            13 => {
                let next = random.pick([0, 4, 6, 17, 41, 43, 44, 50, 51, 58, 59, 60, 135, MARK]);
                put(datagram, INNER + if v4 { 9 } else { 6 }, &[next]);
            }
            14 => put(
                datagram,
                INNER + if v4 { 8 } else { 7 },
                &random.pick([[0], [1], [2], [255]]),
            ),
            15 => put(datagram, INNER + if v4 { 6 } else { 1 }, &[random.next() as u8]),
            _ => {}
        }
    }

    /// Puts another address in the inner header: a place packets neither come from nor go to, or a neighbour.
    fn readdress(&self, datagram: &mut [u8], source: bool, random: &mut Random) {
        let v4 = datagram.get(HEADERS_LEN).is_some_and(|first| first >> 4 == 4);
        let low = random.below(256) as u32;
        if v4 {
            let addr = random.pick([
                host_v4(self.peer.0, low),
                host_v4(self.own.0, low),
                [10, 244, 254, 9].into(),
                [192, 0, 2, 1].into(),
                [192, 0, 2, 2].into(),
                [8, 8, 8, 8].into(),
                [127, 0, 0, 1].into(),
                [0, 0, 0, 0].into(),
                [169, 254, 1, 1].into(),
                [224, 0, 0, 1].into(),
                [240, 0, 0, 1].into(),
                [255, 255, 255, 255].into(),
            ]);
            put(
                datagram,
                HEADERS_LEN + if source { 12 } else { 16 },
                &addr.octets(),
            );
        } else {
            let addr = match random.below(3) {
                0 => host_v6(self.peer.1, low),
                1 => host_v6(self.own.1, low),
                _ => random
                    .pick([
                        "fd00:10:244:fe::9",
                        "2001:db8:1::1",
                        "2001:db8:1::2",
                        "2001:4860:4860::8888",
                        "::",
                        "::1",
                        "::ffff:10.244.1.2",
                        "fe80::1",
                        "ff02::1",
                    ])
                    .parse()
                    .unwrap(),
            };
            put(
                datagram,
                HEADERS_LEN + if source { 8 } else { 24 },
                &addr.octets(),
            );
        }
    }

    /// Why Kersey must refuse what a kernel may take, by nothing but its documented rules.
    fn refusals(&self, case: &Case) -> Vec<Difference> {
        let mut refusals = Vec::new();
        if case.sender == Sender::Stranger {
            refusals.push(Difference::OuterSource);
        }
        let mut inner = case.datagram.get(HEADERS_LEN..).unwrap_or(&[]);
        if is_tagged(&case.datagram) {
            if inner
                .get(..2)
                .is_some_and(|tag| tag[0] & 0x0f == 0 && tag[1] == 0)
            {
                refusals.push(Difference::PriorityTag);
            }
            inner = inner.get(4..).unwrap_or(&[]);
        }
        let (from_peer, for_us) = match inner.first().map(|first| first >> 4) {
            Some(4) if inner.len() >= V4_LEN => {
                let addr = |at: usize| Ipv4Addr::new(inner[at], inner[at + 1], inner[at + 2], inner[at + 3]);
                let (src, dst) = (addr(12), addr(16));
                (
                    self.peer.0.contains(src) || self.from == src,
                    self.own.0.contains(dst),
                )
            }
            Some(6) if inner.len() >= V6_LEN => {
                let addr = |at: usize| Ipv6Addr::from(*inner[at..].first_chunk::<16>().unwrap());
                let (src, dst) = (addr(8), addr(24));
                if !extensions_end(inner) {
                    refusals.push(Difference::ExtensionHeaders);
                }
                (
                    self.peer.1.contains(src) || self.from == src,
                    self.own.1.contains(dst),
                )
            }
            _ => (true, true),
        };
        if !from_peer {
            refusals.push(Difference::InnerSource);
        }
        if !for_us {
            refusals.push(Difference::InnerDestination);
        }
        refusals
    }

    /// Whether node 2 sent a packet by itself: to groups on every link, and ICMP errors to sources that are beyond.
    fn is_nodes_own(&self, packet: &[u8]) -> bool {
        let own_v4 = [0, 1, 2].map(|low| host_v4(self.own.0, low));
        let own_v6 = [0, 1, 2].map(|low| host_v6(self.own.1, low));
        match packet.first().map(|first| first >> 4) {
            Some(4) if packet.len() >= V4_LEN => {
                let src = Ipv4Addr::new(packet[12], packet[13], packet[14], packet[15]);
                let error = packet[9] == 1 && matches!(packet.get(V4_LEN), Some(3 | 5 | 11 | 12));
                packet[16] >> 4 == 0xe || error && (own_v4.contains(&src) || src == self.nodes.0)
            }
            Some(6) if packet.len() >= V6_LEN => {
                let src = Ipv6Addr::from(*packet[8..].first_chunk::<16>().unwrap());
                let error = packet[6] == 58 && matches!(packet.get(V6_LEN), Some(0..128));
                packet[24] == 0xff || error && (own_v6.contains(&src) || src == self.nodes.1)
            }
            // ARP
            _ => true,
        }
    }
}

/// Whether the EtherType is a VLAN tag's.
fn is_tagged(datagram: &[u8]) -> bool {
    matches!(datagram.get(TYPE..HEADERS_LEN), Some([0x81, 0x00] | [0x88, 0xa8]))
}

/// Whether bits of the VXLAN header are set that RFC 7348 §5 reserves.
fn has_reserved_bits(datagram: &[u8]) -> bool {
    datagram
        .first_chunk::<8>()
        .is_some_and(|header| header[0] & !0x08 != 0 || header[1..4] != [0; 3] || header[7] != 0)
}

/// Whether the extension headers of an IPv6 packet end within its length, the 9th at the latest being none (RFC 8200 §4).
fn extensions_end(packet: &[u8]) -> bool {
    let len = V6_LEN + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    let packet = &packet[..len.min(packet.len())];
    let (mut next, mut at) = (packet[6], V6_LEN);
    for _ in 0..8 {
        match next {
            0 | 43 | 60 => {
                let Some(&[following, units]) = packet.get(at..).and_then(|rest| rest.first_chunk::<2>())
                else {
                    return false;
                };
                next = following;
                at += 8 + usize::from(units) * 8;
            }
            44 => {
                let Some(header) = packet.get(at..).and_then(|rest| rest.first_chunk::<8>()) else {
                    return false;
                };
                // What follows a later fragment's header is the middle of something.
                if u16::from_be_bytes([header[2], header[3]]) >> 3 != 0 {
                    return true;
                }
                next = header[0];
                at += 8;
            }
            _ => return at <= packet.len(),
        }
    }
    false
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

/// Overwrites bytes that are there.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(field) = bytes.get_mut(at..at + value.len()) {
        field.copy_from_slice(value);
    }
}

/// Makes an IPv4 header checksum right, over as much of the header as is there.
fn sum_v4(packet: &mut [u8]) {
    if packet.len() < V4_LEN || packet[0] >> 4 != 4 {
        return;
    }
    let header_len = (usize::from(packet[0] & 0xf) * 4).max(V4_LEN).min(packet.len());
    packet[10..12].fill(0);
    let sum = Sum::of(&packet[..header_len]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn host_v4(subnet: Ipv4Prefix, low: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(subnet.addr().to_bits() + low)
}

fn host_v6(subnet: Ipv6Prefix, low: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(subnet.addr().to_bits() + u128::from(low))
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

/// SplitMix64: small, and the same everywhere for a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn pick<T: Clone, const N: usize>(&mut self, from: [T; N]) -> T {
        from[self.below(N)].clone()
    }

    fn bytes<const N: usize>(&mut self, lens: [usize; N]) -> Vec<u8> {
        let len = self.pick(lens);
        (0..len).map(|_| self.next() as u8).collect()
    }
}
