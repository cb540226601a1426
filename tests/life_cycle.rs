//! The life cycle over a scripted store, with the clock in hand.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[path = "life_cycle/fake.rs"]
mod fake;
#[path = "life_cycle/restart.rs"]
mod restart;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kersey::control::config::NetworkConfig;
use kersey::control::{Control, ControlOptions, Published};
use kersey::lease::{Expiration, LeaseEvent, LeaseUpdate, Subnet};
use proptest::prelude::*;
use tokio::time::{Instant, sleep, timeout};

use crate::fake::{Fake, Mood, attrs, lease, subnet};

const CONFIG: &str = r#"{"Network":"10.0.0.0/16"}"#;
const OWN: &str = "10.0.1.0-24";
const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test(start_paused = true)]
async fn a_lease_is_renewed_an_hour_before_it_ends() {
    let fake = Fake::new();
    let _node = start(&fake, options(None)).await;
    sleep(HOUR * 23 - Duration::from_secs(60)).await;
    assert_eq!(fake.script().renewals, 0);
    sleep(Duration::from_secs(120)).await;
    assert_eq!(fake.script().renewals, 1);
    sleep(HOUR * 23).await;
    assert_eq!(fake.script().renewals, 2);
}

/// B11.
#[tokio::test(start_paused = true)]
async fn a_lease_is_renewed_by_the_margin_before_it_ends() {
    let minute = Duration::from_secs(60);
    let fake = Fake::new();
    let options = ControlOptions {
        renew_margin: minute * 10,
        ..options(None)
    };
    let _node = start(&fake, options).await;
    sleep(HOUR * 24 - minute * 11).await;
    assert_eq!(fake.script().renewals, 0);
    sleep(minute * 2).await;
    assert_eq!(fake.script().renewals, 1);
}

#[tokio::test(start_paused = true)]
async fn a_failed_renewal_is_tried_again_for_ever_with_pauses() {
    let fake = Fake::new();
    let node = start(&fake, options(None)).await;
    sleep(HOUR * 22).await;
    fake.script().mood = Mood::Away;
    sleep(HOUR * 6).await;
    let tries = fake.script().renewals;
    // Five hours of pauses between one and two seconds.
    assert!((5 * 1800..5 * 3700).contains(&tries), "{tries}");
    fake.script().mood = Mood::Fine;
    sleep(Duration::from_secs(4)).await;
    let tries = fake.script().renewals;
    sleep(HOUR).await;
    assert_eq!(fake.script().renewals, tries);
    assert_eq!(node.published.lease.borrow().subnet, subnet(OWN));
}

#[tokio::test(start_paused = true)]
async fn a_deleted_lease_is_renewed_at_once() {
    let fake = Fake::new();
    let node = start(&fake, options(None)).await;
    fake.tell(LeaseUpdate::Snapshot(vec![
        lease(OWN, 1),
        lease("10.0.2.0-24", 2),
    ]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fake.script().renewals, 0);
    fake.tell(LeaseUpdate::Events(vec![LeaseEvent::Removed(subnet(OWN))]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fake.script().renewals, 1);
    assert_eq!(node.published.peers.borrow().len(), 1);
}

/// Its end may come long before the next renewal of a reservation.
#[tokio::test(start_paused = true)]
async fn a_reservation_that_is_none_any_more_is_renewed_at_once() {
    let fake = Fake::new();
    fake.script().reserved = true;
    let node = start(&fake, options(None)).await;
    let own = node.published.lease.borrow().clone();
    assert_eq!(own.expiration, Expiration::Never);
    fake.tell(LeaseUpdate::Snapshot(vec![own]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fake.script().renewals, 0);
    fake.tell(LeaseUpdate::Events(vec![LeaseEvent::Added(lease(OWN, 1))]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fake.script().renewals, 1);
    assert!(matches!(
        node.published.lease.borrow().expiration,
        Expiration::At(_)
    ));
    // The event of that renewal asks for none.
    fake.tell(LeaseUpdate::Events(vec![LeaseEvent::Added(lease(OWN, 1))]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fake.script().renewals, 1);
}

/// A store restored from a backup may hold our lease as it was, and a second host with our address may write it.
#[tokio::test(start_paused = true)]
async fn a_lease_that_says_something_else_is_put_right_thrice_and_then_left_until_its_renewal() {
    let fake = Fake::new();
    let _node = start(&fake, options(None)).await;
    let mut altered = lease(OWN, 1);
    altered.attrs.backend_type = "vxlan".to_owned();
    fake.tell(LeaseUpdate::Snapshot(vec![altered.clone()]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fake.script().renewals, 1);
    for _ in 0..10 {
        fake.tell(LeaseUpdate::Events(vec![LeaseEvent::Added(altered.clone())]));
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(fake.script().renewals, 3);
    // What an old server leaves out or words otherwise is no alteration.
    sleep(Duration::from_secs(700)).await;
    fake.tell(LeaseUpdate::Events(vec![LeaseEvent::Added(lease(OWN, 1))]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fake.script().renewals, 3);
    fake.tell(LeaseUpdate::Events(vec![LeaseEvent::Added(altered)]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fake.script().renewals, 4);
}

/// A bad entry is no removal, and no reason to take the store for one that was wiped.
#[tokio::test(start_paused = true)]
async fn a_lease_that_cannot_be_read_any_more_leaves_its_peer_as_it_was() {
    let fake = Fake::new();
    let node = start(&fake, options(None)).await;
    fake.tell(LeaseUpdate::Snapshot(vec![
        lease(OWN, 1),
        lease("10.0.2.0-24", 2),
        lease("10.0.3.0-24", 3),
    ]));
    sleep(Duration::from_secs(1)).await;
    fake.tell_of_rot(
        vec![lease(OWN, 1), lease("10.0.3.0-24", 3)],
        &["10.0.2.0-24", "10.0.9.0-24"],
    );
    sleep(HOUR).await;
    let peers = node.published.peers.borrow().clone();
    assert_eq!(peers.get(subnet("10.0.2.0-24")), Some(&attrs(2)));
    assert_eq!((peers.len(), peers.held(), fake.script().renewals), (2, 0, 0));
    // Ours is looked after at once.
    fake.tell_of_rot(vec![lease("10.0.3.0-24", 3)], &[OWN, "10.0.2.0-24"]);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fake.script().renewals, 1);
    let peers = node.published.peers.borrow().clone();
    assert_eq!((peers.len(), peers.held()), (2, 0));
}

/// B6 and B7 of the list of upstream bugs: a first look that fails ends flannel's renewals, and its view of the peers.
#[tokio::test(start_paused = true)]
async fn a_first_look_that_fails_stops_neither_renewals_nor_the_watch() {
    let fake = Fake::new();
    fake.fail_watch();
    let node = start(&fake, options(None)).await;
    sleep(Duration::from_secs(1)).await;
    assert!(fake.script().watches >= 2);
    fake.tell(LeaseUpdate::Snapshot(vec![
        lease(OWN, 1),
        lease("10.0.2.0-24", 2),
    ]));
    sleep(Duration::from_secs(3)).await;
    assert_eq!(node.published.peers.borrow().len(), 1);
    sleep(HOUR * 24).await;
    assert_eq!(fake.script().renewals, 1);
}

/// B8: a second complete list, as after a compaction, must not take our own lease for one that went.
#[tokio::test(start_paused = true)]
async fn a_second_complete_list_changes_nothing_that_did_not_change() {
    let fake = Fake::new();
    let node = start(&fake, options(None)).await;
    let all = || LeaseUpdate::Snapshot(vec![lease(OWN, 1), lease("10.0.2.0-24", 2)]);
    fake.tell(all());
    sleep(Duration::from_secs(1)).await;
    let mut peers = node.published.peers.clone();
    peers.mark_unchanged();
    fake.tell(all());
    sleep(Duration::from_secs(1)).await;
    assert!(!peers.has_changed().unwrap());
    assert_eq!(fake.script().renewals, 0);
    // B9: but what did change is seen, the subnet being the same.
    fake.tell(LeaseUpdate::Snapshot(vec![
        lease(OWN, 1),
        lease("10.0.2.0-24", 22),
    ]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(
        peers.borrow_and_update().get(subnet("10.0.2.0-24")),
        Some(&attrs(22))
    );
}

/// F9: changes that come together make one table, not one each, and the last word on each subnet counts.
#[tokio::test(start_paused = true)]
async fn a_storm_of_changes_makes_few_tables() {
    let fake = Fake::new();
    let node = start(&fake, options(None)).await;
    fake.tell(LeaseUpdate::Snapshot(vec![lease(OWN, 1)]));
    sleep(Duration::from_secs(1)).await;
    let mut peers = node.published.peers.clone();
    peers.mark_unchanged();
    let counting = tokio::spawn(async move {
        let mut tables = 0;
        while timeout(Duration::from_secs(60), peers.changed()).await.is_ok() {
            tables += 1;
        }
        tables
    });
    for round in 0..10 {
        for i in 2..102 {
            let told = LeaseEvent::Added(lease(&format!("10.0.{i}.0-24"), i + round));
            fake.tell(LeaseUpdate::Events(vec![told]));
        }
    }
    let tables = counting.await.unwrap();
    assert!(tables <= 10, "{tables} tables for a thousand changes");
    let peers = node.published.peers.borrow();
    assert_eq!(peers.len(), 100);
    assert!((2..102).all(|i| peers.get(subnet(&format!("10.0.{i}.0-24"))) == Some(&attrs(i + 9))));
}

/// F8: the node too many asks again, but not all the time; and gets a subnet once there is one.
#[tokio::test(start_paused = true)]
async fn a_node_without_a_subnet_keeps_asking_slowly() {
    let fake = Fake::new();
    let mut control = Control::new(fake.clone(), options(None));
    let config = control.network_config().await;
    fake.script().mood = Mood::Refusing;
    let own = attrs(1);
    let waiting = control.acquire(&own, &config);
    let freed = async {
        sleep(HOUR).await;
        let tries = fake.script().acquisitions;
        assert!((3600 / 15..3600 / 7 + 10).contains(&tries), "{tries}");
        fake.script().mood = Mood::Fine;
        Instant::now()
    };
    let (_, freed) = futures_util::future::join(waiting, freed).await;
    assert!(
        freed.elapsed() <= Duration::from_secs(15),
        "{:?}",
        freed.elapsed()
    );
}

/// A server whose clock is days ahead must not make us believe that our lease lives for days.
#[tokio::test(start_paused = true)]
async fn a_lease_is_renewed_within_a_day_whatever_its_end_is_said_to_be() {
    let fake = Fake::new();
    fake.script().ahead = HOUR * 24 * 3;
    let _node = start(&fake, options(None)).await;
    sleep(HOUR * 24).await;
    assert_eq!(fake.script().renewals, 1);
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_is_given_up_and_another_published() {
    let fake = Fake::new();
    let node = start(&fake, options(None)).await;
    fake.script().mood = Mood::Lost;
    fake.script().next_subnet = "10.0.9.0-24";
    fake.tell(LeaseUpdate::Snapshot(vec![lease(OWN, 66)]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(node.published.lease.borrow().subnet, subnet("10.0.9.0-24"));
    let peers = node.published.peers.borrow();
    assert_eq!(
        peers
            .iter()
            .map(|(subnet, _)| subnet.to_string())
            .collect::<Vec<_>>(),
        [OWN]
    );
}

#[tokio::test(start_paused = true)]
async fn everything_is_listed_anew_every_five_minutes() {
    let fake = Fake::new();
    let _node = start(&fake, options(None)).await;
    sleep(HOUR).await;
    let watches = fake.script().watches;
    assert!((10..=14).contains(&watches), "{watches}");
}

#[tokio::test(start_paused = true)]
async fn a_broken_watch_is_made_anew_with_pauses_and_removes_nobody() {
    let fake = Fake::new();
    let node = start(&fake, options(None)).await;
    fake.tell(LeaseUpdate::Snapshot(vec![
        lease(OWN, 1),
        lease("10.0.2.0-24", 2),
    ]));
    sleep(Duration::from_secs(1)).await;
    let peers = node.published.peers.clone();
    fake.script().mood = Mood::Away;
    fake.end_watch();
    let before = fake.script().watches;
    sleep(Duration::from_secs(600)).await;
    let watches = fake.script().watches - before;
    assert!((300..=620).contains(&watches), "{watches}");
    assert!(!node.published.health.borrow().connected);
    assert_eq!(peers.borrow().len(), 1);
    fake.script().mood = Mood::Fine;
    fake.tell(LeaseUpdate::Snapshot(vec![
        lease(OWN, 1),
        lease("10.0.3.0-24", 3),
    ]));
    sleep(Duration::from_secs(3)).await;
    assert!(node.published.health.borrow().connected);
    assert!(peers.borrow().get(subnet("10.0.3.0-24")).is_some());
}

#[tokio::test(start_paused = true)]
async fn vanished_peers_linger_for_a_minute() {
    let fake = Fake::new();
    let node = start(&fake, options(None)).await;
    let four: Vec<_> = (2..6)
        .map(|i| lease(&format!("10.0.{i}.0-24"), i))
        .chain([lease(OWN, 1)])
        .collect();
    fake.tell(LeaseUpdate::Snapshot(four));
    fake.tell(LeaseUpdate::Snapshot(vec![lease(OWN, 1)]));
    sleep(Duration::from_secs(50)).await;
    assert_eq!(node.published.peers.borrow().len(), 4);
    sleep(Duration::from_secs(15)).await;
    assert_eq!(node.published.peers.borrow().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn whoever_vanishes_last_has_the_whole_minute_to_come_back() {
    let fake = Fake::new();
    let node = start(&fake, options(None)).await;
    let leases = |peers: std::ops::Range<u8>| peers.map(|i| lease(&format!("10.0.{i}.0-24"), i));
    let list = |last| LeaseUpdate::Snapshot(leases(2..last).chain([lease(OWN, 1)]).collect());
    fake.tell(list(12));
    fake.tell(list(6));
    sleep(Duration::from_secs(50)).await;
    // A list that lacks us, too.
    fake.tell(LeaseUpdate::Snapshot(leases(2..3).collect()));
    sleep(Duration::from_secs(20)).await;
    assert_eq!(node.published.peers.borrow().len(), 10);
    sleep(Duration::from_secs(45)).await;
    assert_eq!(node.published.peers.borrow().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_peers_are_confirmed_once_the_store_has_listed_them() {
    let fake = Fake::new();
    let mut node = start(&fake, options(None)).await;
    sleep(Duration::from_secs(1)).await;
    assert!(!node.published.peers.borrow_and_update().is_confirmed());
    // A list in which nobody is new is news all the same.
    fake.tell(LeaseUpdate::Snapshot(vec![lease(OWN, 1)]));
    let told = timeout(Duration::from_secs(1), node.published.peers.changed()).await;
    told.unwrap().unwrap();
    assert!(node.published.peers.borrow_and_update().is_confirmed());
    // The second time it is not.
    fake.tell(LeaseUpdate::Snapshot(vec![lease(OWN, 1)]));
    sleep(Duration::from_secs(1)).await;
    assert!(!node.published.peers.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_bad_config_is_waited_out() {
    let fake = Fake::new();
    fake.script().config = r#"{"Network":"10.0.0.0/16","SubnetLen":17}"#;
    let waiting = async {
        let mut control = Control::new(fake.clone(), options(None));
        control.network_config().await
    };
    let mended = async {
        sleep(Duration::from_secs(30)).await;
        fake.script().config = CONFIG;
    };
    let (config, ()) = timeout(
        Duration::from_secs(32),
        futures_util::future::join(waiting, mended),
    )
    .await
    .unwrap();
    assert_eq!(config, NetworkConfig::parse(CONFIG).unwrap());
}

#[derive(Clone, Debug)]
enum Step {
    Tell(LeaseUpdate),
    Fail,
    End,
    Wait(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    let any_lease = || (2_u8..10).prop_map(|i| lease(&format!("10.0.{i}.0-24"), i));
    let event = prop_oneof![
        2 => any_lease().prop_map(LeaseEvent::Added),
        1 => any_lease().prop_map(|lease| LeaseEvent::Removed(lease.subnet)),
    ];
    prop_oneof![
        2 => prop::collection::vec(any_lease(), 0..6).prop_map(|leases| Step::Tell(LeaseUpdate::Snapshot(leases))),
        3 => prop::collection::vec(event, 1..4).prop_map(|events| Step::Tell(LeaseUpdate::Events(events))),
        2 => Just(Step::Fail),
        2 => Just(Step::End),
        1 => (0_u64..400).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    /// F6: whatever breaks in whatever order, no peer goes whose removal the store did not tell.
    #[test]
    fn nothing_is_removed_that_was_not_told(steps in prop::collection::vec(any_step(), 0..20)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let fake = Fake::new();
            let node = start(&fake, options(None)).await;
            // Peers the store has told to go and not told of since; they may linger before they do.
            let mut may_go = BTreeSet::new();
            for step in steps {
                let before = peers(&node);
                match step {
                    Step::Tell(update) => {
                        match &update {
                            LeaseUpdate::Snapshot(leases) => {
                                may_go.extend(&before);
                                may_go.retain(|subnet| leases.iter().all(|lease| lease.subnet != *subnet));
                            }
                            LeaseUpdate::Events(events) => {
                                for event in events {
                                    match event {
                                        LeaseEvent::Added(lease) => may_go.remove(&lease.subnet),
                                        LeaseEvent::Removed(subnet) => may_go.insert(*subnet),
                                    };
                                }
                            }
                        }
                        fake.tell(update);
                    }
                    Step::Fail => fake.fail_watch(),
                    Step::End => fake.end_watch(),
                    Step::Wait(seconds) => sleep(Duration::from_secs(seconds)).await,
                }
                sleep(Duration::from_secs(3)).await;
                let now = peers(&node);
                let gone: BTreeSet<_> = before.difference(&now).copied().collect();
                prop_assert!(gone.is_subset(&may_go), "{:?} went", gone);
                let lingering = node.published.peers.borrow().held();
                let left = now.intersection(&may_go).count();
                prop_assert_eq!(left, lingering, "some did not go");
            }
            Ok(())
        })?;
    }
}

fn peers(node: &Node) -> BTreeSet<Subnet> {
    node.published
        .peers
        .borrow()
        .iter()
        .map(|(subnet, _)| subnet)
        .collect()
}

struct Node {
    published: Published,
    maintain: tokio::task::JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.maintain.abort();
    }
}

async fn start(fake: &Arc<Fake>, options: ControlOptions) -> Node {
    let mut control = Control::new(fake.clone(), options);
    let config = control.network_config().await;
    let lease = control.acquire(&attrs(1), &config).await;
    let (publish, published) = control.channels(&config, &lease);
    Node {
        published,
        maintain: tokio::spawn(control.maintain(publish)),
    }
}

fn options(state_dir: Option<&Path>) -> ControlOptions {
    ControlOptions {
        state_dir: state_dir.map(Path::to_owned),
        subnet_file: "/nonexistent/subnet.env".into(),
        ..ControlOptions::default()
    }
}
