//! Requests to the kernel, in a namespace of their own.

#![expect(
    clippy::unwrap_used,
    reason = "in the helpers of tests it says where a test failed"
)]

mod support;

use std::net::IpAddr;

use futures_util::StreamExt;
use kersey::addr::Prefix;
use kersey::host::interface::{Families, InterfaceRequest};
use kersey::host::netlink::{Gateway, LinkChange, Netlink, NetlinkError, Route, RouteOwner, Vxlan};
use kersey::host::sysctl;
use kersey::lab::netns::Namespace;
use kersey::lab::topology::{HUB_V4, INTERFACE, Plan};
use support::require_root;

#[test]
fn routes_are_told_from_other_peoples_and_replacing_is_idempotent() {
    if !require_root("routes_are_told_from_other_peoples_and_replacing_is_idempotent") {
        return;
    }
    in_namespace("routes", async |netlink| {
        let index = veth(&netlink).await?;
        netlink.add_address(index, "192.0.2.1".parse()?, 24).await?;
        netlink.add_address(index, "192.0.2.1".parse()?, 24).await?;
        let mut onlink = Route::direct(v4("10.244.7.0/24"), index);
        onlink.gateway = Gateway::OnLink("10.244.7.0".parse()?);
        onlink.mtu_bytes = Some(1300);
        let mut narrow = Route::direct(v6("fd00:10:244:7::/64"), index);
        narrow.mtu_bytes = Some(1320);
        let mut routes = vec![
            Route::direct(v4("10.244.0.0/16"), index),
            onlink,
            Route::direct(v6("fd00:10:244::/56"), index),
            narrow,
        ];
        for route in &routes {
            netlink.replace_route(route).await?;
            netlink.replace_route(route).await?;
        }
        let mut own = netlink.own_routes().await?;
        own.sort_by_key(|route| route.destination);
        assert_eq!(own, routes);
        let all = netlink.routes().await?;
        let connected = all
            .iter()
            .find(|held| held.route.destination == v4("192.0.2.0/24"));
        assert_eq!(connected.map(|held| held.owner), Some(RouteOwner::Kernel));
        let ours = all.iter().filter(|held| held.owner == RouteOwner::Kersey);
        assert_eq!(ours.count(), routes.len());

        // Another MTU is another route.
        routes[3].mtu_bytes = Some(1400);
        netlink.replace_route(&routes[3]).await?;
        let mut own = netlink.own_routes().await?;
        own.sort_by_key(|route| route.destination);
        assert_eq!(own, routes);

        let error = netlink.add_route(&routes[0]).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));

        let gone = routes.remove(0);
        netlink.delete_route(&gone).await?;
        netlink.delete_route(&gone).await?;
        assert_eq!(netlink.own_routes().await?.len(), 3);
        Ok(())
    });
}

#[test]
fn a_link_takes_what_it_is_told() {
    if !require_root("a_link_takes_what_it_is_told") {
        return;
    }
    in_namespace("link", async |netlink| {
        let index = veth(&netlink).await?;
        netlink.set_mtu(index, 1400).await?;
        netlink.set_tx_queue_len(index, 500).await?;
        let link = netlink.link("v0").await?;
        assert_eq!((link.mtu_bytes, link.tx_queue_len), (1400, 500));
        assert!(link.is_running() && !link.is_loopback());

        for (addr, len) in [("10.244.1.0", 32), ("fd00:10:244::1", 128)] {
            let addr: IpAddr = addr.parse()?;
            netlink.add_address(index, addr, len).await?;
            netlink.add_address(index, addr, len).await?;
            let held = netlink.addresses().await?;
            assert_eq!(
                held.iter()
                    .filter(|held| held.addr == addr && held.prefix_len == len)
                    .count(),
                1
            );
            netlink.delete_address(index, addr, len).await?;
            netlink.delete_address(index, addr, len).await?;
            assert!(!netlink.addresses().await?.iter().any(|held| held.addr == addr));
        }
        netlink.delete_link(index).await?;
        netlink.delete_link(index).await?;
        assert!(matches!(netlink.link("v0").await, Err(NetlinkError::NoLink(_))));
        Ok(())
    });
}

#[test]
fn a_link_told_so_has_no_ipv6_address_of_its_own() {
    if !require_root("a_link_told_so_has_no_ipv6_address_of_its_own") {
        return;
    }
    in_namespace("addrgen", async |netlink| {
        netlink.add_veth("v0", "v1", None).await?;
        sysctl::no_link_local_address("v0")?;
        sysctl::disable_ipv6("v1")?;
        for name in ["v0", "v1"] {
            netlink.set_up(netlink.link(name).await?.index).await?;
        }
        assert!(
            netlink
                .addresses()
                .await?
                .iter()
                .all(|held| held.addr.is_loopback())
        );
        Ok(())
    });
}

#[test]
fn errors_name_the_operation_and_its_object() {
    if !require_root("errors_name_the_operation_and_its_object") {
        return;
    }
    in_namespace("errors", async |netlink| {
        let route = Route::direct(v4("10.244.0.0/16"), 4321);
        let error = anyhow::Error::from(netlink.replace_route(&route).await.unwrap_err());
        let text = format!("{error:#}");
        assert!(
            text.starts_with("cannot set route 10.244.0.0/16 on interface 4321: "),
            "{text}"
        );
        Ok(())
    });
}

#[test]
fn a_vxlan_device_and_its_neighbours_are_made_as_flannel_makes_them() {
    if !require_root("a_vxlan_device_and_its_neighbours_are_made_as_flannel_makes_them") {
        return;
    }
    in_namespace("vxlan", async |netlink| {
        let underlay_index = veth(&netlink).await?;
        netlink
            .add_address(underlay_index, "192.0.2.1".parse()?, 24)
            .await?;
        let vxlan = Vxlan {
            name: "flannel.1",
            vni: 1,
            underlay_index,
            local: "192.0.2.1".parse()?,
            port: 8472,
            mtu_bytes: 1450,
        };
        netlink.add_vxlan(&vxlan).await?;
        let link = netlink.link("flannel.1").await?;
        assert_eq!(link.mtu_bytes, 1450);
        netlink.set_up(link.index).await?;
        let mac = [0xee, 1, 2, 3, 4, 5];
        for _ in 0..2 {
            netlink
                .set_neighbour(link.index, "10.244.2.0".parse()?, mac)
                .await?;
            netlink.set_fdb(link.index, mac, "192.0.2.2".parse()?).await?;
        }
        // Another place for the same address replaces the first.
        netlink.set_fdb(link.index, mac, "192.0.2.3".parse()?).await?;
        netlink
            .add_address(underlay_index, "192.0.2.9".parse()?, 24)
            .await?;
        netlink
            .set_vxlan_local("flannel.1", 1, "192.0.2.9".parse()?)
            .await?;
        let other_family = netlink
            .set_vxlan_local("flannel.1", 1, "2001:db8::9".parse()?)
            .await;
        assert!(other_family.is_err(), "a device over IPv4 has no IPv6 address");
        for _ in 0..2 {
            netlink
                .delete_neighbour(link.index, "10.244.2.0".parse()?)
                .await?;
            netlink.delete_fdb(link.index, mac).await?;
        }
        Ok(())
    });
}

#[test]
fn changes_are_reported() {
    if !require_root("changes_are_reported") {
        return;
    }
    in_namespace("watch", async |netlink| {
        let mut changes = Netlink::watch()?;
        let index = veth(&netlink).await?;
        let addr: IpAddr = "192.0.2.7".parse()?;
        netlink.add_address(index, addr, 32).await?;
        netlink.delete_link(index).await?;
        let (mut came, mut held) = (false, false);
        loop {
            match changes.next().await.expect("the stream goes on") {
                LinkChange::Link(link) => came |= link.name == "v0",
                LinkChange::Address(seen) => held |= seen.addr == addr && seen.index == index,
                LinkChange::LinkGone(link) if link.name == "v0" => break,
                LinkChange::LinkGone(_)
                | LinkChange::AddressGone(_)
                | LinkChange::RouteGone(_)
                | LinkChange::DefaultRoute(_)
                | LinkChange::Rule
                | LinkChange::Overrun => {}
            }
        }
        assert!(came && held);
        Ok(())
    });
}

#[test]
fn the_underlay_is_found_by_default_route_and_by_reach() {
    if !require_root("the_underlay_is_found_by_default_route_and_by_reach") {
        return;
    }
    let lab = Plan::private("choose", 1).build().unwrap();
    let mut request = InterfaceRequest {
        ifaces: Vec::new(),
        iface_regexes: Vec::new(),
        can_reach: None,
        public_ip: None,
        public_ipv6: None,
        families: Families::Dual,
    };
    let node = &lab.nodes[0];
    let chosen = node
        .namespace
        .netlink(async |netlink| Ok(request.choose(&netlink).await?))
        .unwrap();
    assert_eq!((chosen.name.as_str(), chosen.mtu.bytes()), (INTERFACE, 1500));
    assert_eq!((chosen.v4, chosen.public_v6), (Some(node.v4), Some(node.v6)));

    request.families = Families::V4;
    request.can_reach = Some(HUB_V4.into());
    let chosen = node
        .namespace
        .netlink(async |netlink| Ok(request.choose(&netlink).await?))
        .unwrap();
    assert_eq!((chosen.v4, chosen.v6), (Some(node.v4), None));

    let empty = Namespace::create(&format!("kersey-{}-empty", std::process::id())).unwrap();
    let error = empty
        .netlink(async |netlink| Ok(request.choose(&netlink).await?))
        .unwrap_err();
    let text = format!("{error:#}");
    assert!(
        text.contains("--iface-can-reach 192.0.2.254 (cannot find a route to"),
        "{text}"
    );
}

/// B23: of several default routes the best counts, by the metric of its family; where the main table has none, what policy routing says.
#[test]
fn metrics_and_policy_routing_decide_between_two_uplinks() {
    if !require_root("metrics_and_policy_routing_decide_between_two_uplinks") {
        return;
    }
    in_namespace("uplinks", async |netlink| {
        for (nth, link) in (1..).zip(["up1", "up2"]) {
            netlink.add_veth(link, &format!("far{nth}"), None).await?;
            for name in [link.to_owned(), format!("far{nth}")] {
                netlink.set_up(netlink.link(&name).await?.index).await?;
            }
            let index = netlink.link(link).await?.index;
            for (addr, len) in [(format!("198.51.{nth}.2"), 24), (format!("fd00:{nth}::2"), 64)] {
                netlink.add_address(index, addr.parse()?, len).await?;
            }
        }
        let request = |families| InterfaceRequest {
            ifaces: Vec::new(),
            iface_regexes: Vec::new(),
            can_reach: None,
            public_ip: None,
            public_ipv6: None,
            families,
        };
        let ip = |words: &str| {
            let mut command = std::process::Command::new("ip");
            let ended = command.args(words.split_whitespace()).status().unwrap();
            assert!(ended.success(), "ip {words}");
        };
        let chosen = async |families| {
            let chosen = request(families).choose(&netlink).await;
            chosen
                .map(|chosen| chosen.name)
                .map_err(|error| error.to_string())
        };
        for (families, family, near, no_default) in [
            (Families::V4, "-4", "198.51.N.1", "there is no IPv4 default route"),
            (Families::V6, "-6", "fd00:N::1", "there is no IPv6 default route"),
        ] {
            let route = |verb: &str, nth: u8, more: &str| {
                let via = near.replace('N', &nth.to_string());
                ip(&format!(
                    "{family} route {verb} default via {via} dev up{nth} {more}"
                ));
            };
            assert!(chosen(families).await.unwrap_err().contains(no_default));
            // The one with the worse metric stands first or last, as it was added.
            for (best, other) in [(1, 2), (2, 1)] {
                route("add", 1, &format!("metric {}", if best == 1 { 100 } else { 600 }));
                route("add", 2, &format!("metric {}", if best == 2 { 100 } else { 600 }));
                assert_eq!(chosen(families).await, Ok(format!("up{best}")), "{families:?}");
                route("del", best, "metric 100");
                assert_eq!(chosen(families).await, Ok(format!("up{other}")), "{families:?}");
                route("del", other, "metric 600");
            }
            // The only default route is in a table of its own, which a rule leads to, behind the main table and before it.
            route("add", 2, "table 100");
            assert!(chosen(families).await.unwrap_err().contains(no_default));
            for priority in [40000, 1000] {
                ip(&format!("{family} rule add table 100 priority {priority}"));
                assert_eq!(
                    chosen(families).await,
                    Ok("up2".to_owned()),
                    "{families:?}, {priority}"
                );
                ip(&format!("{family} rule del table 100 priority {priority}"));
            }
            // A rule for other senders is none for us, and a route that leads nowhere is none.
            ip(&format!(
                "{family} rule add from {} table 100",
                near.replace('N', "9")
            ));
            assert!(chosen(families).await.unwrap_err().contains(no_default));
            ip(&format!("{family} route add unreachable default metric 50"));
            route("add", 1, "metric 700");
            assert_eq!(chosen(families).await, Ok("up1".to_owned()), "{families:?}");
            ip(&format!("{family} route del unreachable default metric 50"));
            route("del", 1, "metric 700");
            ip(&format!("{family} rule add table 100 priority 40000"));
        }
        // Both families by policy routing, and by the same link.
        assert_eq!(chosen(Families::Dual).await, Ok("up2".to_owned()));
        ip("-6 route replace default via fd00:1::1 dev up1 table 100");
        let differ = chosen(Families::Dual).await.unwrap_err();
        assert!(differ.contains("different interfaces, up2 and up1"), "{differ}");
        Ok(())
    });
}

fn in_namespace(tag: &str, work: impl AsyncFnOnce(Netlink) -> anyhow::Result<()> + Send) {
    let namespace = Namespace::create(&format!("kersey-{}-{tag}", std::process::id())).unwrap();
    namespace.netlink(work).unwrap();
}

/// A veth pair v0–v1, both up; gives the number of v0.
async fn veth(netlink: &Netlink) -> anyhow::Result<u32> {
    netlink.add_veth("v0", "v1", None).await?;
    for name in ["v0", "v1"] {
        netlink.set_up(netlink.link(name).await?.index).await?;
    }
    Ok(netlink.link("v0").await?.index)
}

fn v4(text: &str) -> Prefix {
    Prefix::V4(text.parse().unwrap())
}

fn v6(text: &str) -> Prefix {
    Prefix::V6(text.parse().unwrap())
}
