//! What senders are told when a packet goes no further.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use kersey::lab::cluster::ClusterPlan;
use kersey::lab::traffic::End;
use socket2::{Domain, Protocol, Socket, Type};

use crate::overlay::{Blueprint, figure, wait_for};
use crate::support::require_root;

#[test]
fn traceroute_sees_both_daemons() {
    if !require_root("traceroute_sees_both_daemons") {
        return;
    }
    let mut blueprint = Blueprint::embedded("trace", 2);
    blueprint.network = ClusterPlan::network("udp", true);
    let overlay = blueprint.start();
    let hops: Vec<Vec<IpAddr>> = (1..=2)
        .map(|nth| {
            let subnets = overlay.status(nth).node.subnets;
            let first = subnets
                .iter()
                .map(|subnet| subnet.split_once('/').unwrap().0.parse().unwrap());
            first.collect()
        })
        .collect();
    let ends = overlay.pods(1).into_iter().zip(overlay.pods(2));
    for (family, (from, to)) in ends.enumerate() {
        // Host to host: the one daemon, the other daemon, the destination (flannel's count).
        let trace = Trace::new(from);
        assert_eq!(
            trace.once(to.addr, 1),
            Some(Answer::TimeExceeded(hops[0][family])),
            "{from:?}"
        );
        assert_eq!(
            trace.once(to.addr, 2),
            Some(Answer::TimeExceeded(hops[1][family])),
            "{from:?}"
        );
        assert_eq!(trace.once(to.addr, 3), Some(Answer::Reached(to.addr)), "{from:?}");
    }
    assert_eq!(overlay.status(1).drops["ttl_expired"], 2);
    assert_eq!(overlay.status(2).drops["ttl_expired"], 2);
}

#[test]
fn a_sender_to_nowhere_is_told_and_not_too_often() {
    if !require_root("a_sender_to_nowhere_is_told_and_not_too_often") {
        return;
    }
    let mut blueprint = Blueprint::embedded("nowhere", 2);
    blueprint.network = ClusterPlan::network("udp", true);
    let overlay = blueprint.start();
    let nowhere: [IpAddr; 2] = [
        "10.244.254.1".parse().unwrap(),
        "fd00:10:244:fe::1".parse().unwrap(),
    ];
    for (from, to) in overlay.pods(1).into_iter().zip(nowhere) {
        let trace = Trace::new(from);
        let socket = from
            .namespace
            .run(|| Ok(UdpSocket::bind((from.addr, 0))?))
            .unwrap();
        socket.send_to(b"anybody?", (to, 9)).unwrap();
        let mut answer = None;
        wait_for("an ICMP error comes", Duration::from_secs(2), || {
            answer = trace.answer();
            answer.is_some()
        });
        let own = overlay.device(1).unwrap().1;
        let own = own
            .iter()
            .map(|held| held.addr)
            .find(|held| held.is_ipv4() == to.is_ipv4());
        assert_eq!(answer, own.map(Answer::Unreachable));

        // A connection fails at once, not after minutes.
        let connect = from.namespace.run(|| {
            let socket = Socket::new(Domain::for_address((to, 9).into()), Type::STREAM, None)?;
            socket.bind(&SocketAddr::new(from.addr, 0).into())?;
            let error = socket
                .connect_timeout(&SocketAddr::new(to, 9).into(), Duration::from_secs(3))
                .unwrap_err();
            drop(TcpStream::from(socket));
            Ok(error)
        });
        let error = connect.unwrap();
        let unreachable = [libc::ENETUNREACH, libc::EHOSTUNREACH];
        assert!(
            error
                .raw_os_error()
                .is_some_and(|errno| unreachable.contains(&errno)),
            "{to}: {error:?}"
        );

        // S6: a flood is answered no more than ten times in any second, whichever second one looks at.
        while trace.answer().is_some() {}
        let before = overlay.status(1).counters;
        let answers = flooded(&trace, &socket, (to, 9).into());
        let now = overlay.status(1).counters;
        let of = |name| now[name] - before[name];
        let (sent, limited) = (of("icmp_sent"), of("icmp_limited"));
        let most = most_in_a_second(&answers);
        figure(
            "ICMP errors in a flood of 3 s: sent, limited, heard, most in a second",
            (sent, limited, answers.len(), most),
        );
        assert!(limited > 1000, "{limited}");
        assert!(
            most <= 10 && (6..=30).contains(&answers.len()),
            "{to}: {answers:?}"
        );
        assert!(sent <= 30, "{sent}");
    }
    let echo = overlay.status(1);
    assert!(echo.drops["no_route"] >= 1000, "{echo:#?}");
}

/// Sends to where nobody is for three seconds, and gives when an error came.
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn flooded(trace: &Trace<'_>, socket: &UdpSocket, to: SocketAddr) -> Vec<Duration> {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let flood = scope.spawn(move || {
            while start.elapsed() < Duration::from_secs(3) {
                let _ = socket.send_to(b"anybody?", to);
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let mut answers = Vec::new();
        while !flood.is_finished() {
            if trace.answer().is_some() {
                answers.push(start.elapsed());
            }
        }
        answers
    })
}

/// The most in any second, wherever it begins.
fn most_in_a_second(times: &[Duration]) -> usize {
    let from = |first: &Duration| {
        let within = |at: &&Duration| *at >= first && **at - *first < Duration::from_secs(1);
        times.iter().filter(within).count()
    };
    times.iter().map(from).max().unwrap_or(0)
}

/// What an ICMP message to us says, and who says it.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    TimeExceeded(IpAddr),
    Unreachable(IpAddr),
    Reached(IpAddr),
}

/// A raw ICMP socket.
struct Trace<'a> {
    from: End<'a>,
    socket: Socket,
}

impl<'a> Trace<'a> {
    fn new(from: End<'a>) -> Self {
        let (domain, protocol) = match from.addr {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = from
            .namespace
            .run(|| {
                let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
                socket.bind(&SocketAddr::new(from.addr, 0).into())?;
                socket.set_read_timeout(Some(Duration::from_millis(300)))?;
                Ok(socket)
            })
            .unwrap();
        Self { from, socket }
    }

    /// Sends an echo request that may cross so many hops, and gives the first answer.
    fn once(&self, to: IpAddr, ttl: u32) -> Option<Answer> {
        let mut request = match to {
            IpAddr::V4(_) => {
                self.socket.set_ttl_v4(ttl).unwrap();
                // Type 8, and the checksum of just that: 0xffff - 0x0800.
                vec![8, 0, 0xf7, 0xff, 0, 0, 0, 0]
            }
            IpAddr::V6(_) => {
                self.socket.set_unicast_hops_v6(ttl).unwrap();
                vec![128, 0, 0, 0, 0, 0, 0, 0]
            }
        };
        // Some data, whose checksum is that of nothing.
        request.extend([0; 32]);
        let to = SocketAddr::new(to, 0);
        self.socket.send_to(&request, &to.into()).unwrap();
        self.answer()
    }

    fn answer(&self) -> Option<Answer> {
        let mut buffer = [0; 2048];
        loop {
            let (from, len, start) = match self.from.addr {
                IpAddr::V4(_) => {
                    let len = (&self.socket).read(&mut buffer).ok()?;
                    let from: [u8; 4] = buffer[12..16].try_into().unwrap();
                    (
                        IpAddr::from(Ipv4Addr::from(from)),
                        len,
                        usize::from(buffer[0] & 15) * 4,
                    )
                }
                IpAddr::V6(_) => {
                    // Only recvfrom tells the source of a raw IPv6 packet.
                    let socket = UdpSocket::from(self.socket.try_clone().unwrap());
                    let (len, from) = socket.recv_from(&mut buffer).ok()?;
                    (from.ip(), len, 0)
                }
            };
            match (self.from.addr.is_ipv4(), &buffer[start..len]) {
                (true, [11, 0, ..]) | (false, [3, 0, ..]) => return Some(Answer::TimeExceeded(from)),
                // Net unreachable; no route to destination.
                (true, [3, 0, ..]) | (false, [1, 0, ..]) => return Some(Answer::Unreachable(from)),
                (true, [0, 0, ..]) | (false, [129, 0, ..]) => return Some(Answer::Reached(from)),
                _ => {}
            }
        }
    }
}
