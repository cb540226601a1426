//! The life cycle over a scripted store, with the clock in hand.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use kersey::control::config::NetworkConfig;
use kersey::control::identity::Holder;
use kersey::control::store::{Cursor, Store, StoreError, WatchItem};
use kersey::control::{Control, ControlOptions, Published};
use kersey::lease::{Expiration, Lease, LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};
use proptest::prelude::*;
use tokio::time::{Instant, sleep, timeout};

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

/// A node that starts again where `subnet.env` names the subnet it had.
fn options_of_a_restart(dir: &Path) -> ControlOptions {
    let subnet_file = dir.join("subnet.env");
    std::fs::write(
        &subnet_file,
        "FLANNEL_NETWORK=10.0.0.0/16\nFLANNEL_SUBNET=10.0.1.1/24\n",
    )
    .unwrap();
    ControlOptions {
        subnet_file,
        ..options(None)
    }
}

/// F10: a restart does not wait for the store to write anything.
#[tokio::test(start_paused = true)]
async fn a_lease_seen_in_the_store_is_taken_at_once_and_renewed_right_after() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    fake.script().shown = Some(lease(OWN, 1));
    let begun = Instant::now();
    let node = start(&fake, options_of_a_restart(dir.path())).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(fake.asked(), (0, 0));
    assert_eq!(fake.script().looks, [subnet(OWN)]);
    assert!(node.published.health.borrow().connected);
    sleep(Duration::from_millis(1)).await;
    assert_eq!(fake.asked(), (0, 1));
    assert_eq!(node.published.lease.borrow().subnet, subnet(OWN));
    // From here on it is a lease like any other.
    sleep(HOUR * 22).await;
    assert_eq!(fake.script().renewals, 1);
}

/// F2, F15: what was seen may be another's before it is renewed. Then it is given up, as ever.
#[tokio::test(start_paused = true)]
async fn a_lease_that_was_seen_and_is_lost_at_its_renewal_is_given_up_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    fake.script().shown = Some(lease(OWN, 1));
    fake.script().mood = Mood::Lost;
    fake.script().next_subnet = "10.0.9.0-24";
    let mut node = start(&fake, options_of_a_restart(dir.path())).await;
    assert_eq!(node.published.lease.borrow_and_update().subnet, subnet(OWN));
    node.published.lease.changed().await.unwrap();
    assert_eq!(node.published.lease.borrow().subnet, subnet("10.0.9.0-24"));
    assert_eq!(fake.asked(), (1, 1));
    assert_eq!(node.published.health.borrow().conflicts, 1);
}

#[tokio::test(start_paused = true)]
async fn where_a_look_shows_nothing_the_lease_is_acquired_as_ever() {
    let dir = tempfile::tempdir().unwrap();
    // Not there; and no life before this one.
    for restart in [true, false] {
        let fake = Fake::new();
        let options = if restart {
            options_of_a_restart(dir.path())
        } else {
            options(None)
        };
        let _node = start(&fake, options).await;
        assert_eq!(fake.script().looks.len(), usize::from(restart));
        sleep(HOUR).await;
        assert_eq!(fake.asked(), (1, 0));
    }
    // A subnet that the network would not hand out any more is not looked for.
    let fake = Fake::new();
    fake.script().config = r#"{"Network":"10.9.0.0/16"}"#;
    fake.script().next_subnet = "10.9.1.0-24";
    let _node = start(&fake, options_of_a_restart(dir.path())).await;
    assert!(fake.script().looks.is_empty());
    assert_eq!(fake.asked(), (1, 0));
}

/// A store that does not answer is not waited for any longer because of the look.
#[tokio::test(start_paused = true)]
async fn a_look_at_a_silent_store_costs_no_patience() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let mut options = options_of_a_restart(dir.path());
    options.state_dir = Some(dir.path().to_owned());
    let node = start(&fake, options.clone()).await;
    sleep(Duration::from_secs(10)).await;
    drop(node);
    let mut control = Control::new(fake.clone(), options);
    let config = control.network_config().await;
    fake.script().mood = Mood::Silent;
    let begun = Instant::now();
    assert_eq!(control.acquire(&attrs(1), &config).await.subnet, subnet(OWN));
    assert_eq!(begun.elapsed(), kersey::control::PATIENCE);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_moves_takes_its_lease_along() {
    // F13.
    let fake = Fake::new();
    let mut control = Control::new(fake.clone(), options(None)).moving(Some(lease(OWN, 1)));
    let config = control.network_config().await;
    let taken = control.acquire(&attrs(7), &config).await;
    assert_eq!((taken.subnet, taken.attrs), (subnet(OWN), attrs(7)));
    let ip = |i| std::net::Ipv4Addr::new(192, 0, 2, i);
    assert_eq!(fake.script().readdressed, [(ip(1), ip(7))]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_moves_while_the_store_is_away_goes_on_and_tells_it_later() {
    // F13 in F1.
    let fake = Fake::new();
    let mut control = Control::new(fake.clone(), options(None)).moving(Some(lease(OWN, 1)));
    let config = control.network_config().await;
    fake.script().mood = Mood::Silent;
    let begun = Instant::now();
    let taken = control.acquire(&attrs(7), &config).await;
    assert!(begun.elapsed() <= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!((taken.subnet, taken.attrs.clone()), (subnet(OWN), attrs(7)));
    fake.script().mood = Mood::Away;
    let (publish, published) = control.channels(&config, &taken);
    let node = Node {
        published,
        maintain: tokio::spawn(control.maintain(publish)),
    };
    sleep(Duration::from_secs(30)).await;
    assert_eq!(fake.script().readdressed, []);
    fake.script().mood = Mood::Fine;
    sleep(Duration::from_secs(4)).await;
    let ip = |i| std::net::Ipv4Addr::new(192, 0, 2, i);
    assert_eq!(fake.script().readdressed, [(ip(1), ip(7))]);
    // From then on it is a lease like any other.
    let renewals = fake.script().renewals;
    sleep(HOUR * 24).await;
    assert_eq!(fake.script().readdressed.len(), 1);
    assert_eq!(fake.script().renewals, renewals + 1);
    assert_eq!(node.published.lease.borrow().subnet, subnet(OWN));
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
async fn a_silent_store_is_waited_for_or_the_cache_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    fake.script().mood = Mood::Away;
    let mut control = Control::new(fake.clone(), options(Some(dir.path())));
    // Without a cache there is nothing to start with.
    assert!(timeout(HOUR, control.network_config()).await.is_err());
    fake.script().mood = Mood::Fine;
    let node = start(&fake, options(Some(dir.path()))).await;
    fake.tell(LeaseUpdate::Snapshot(vec![
        lease(OWN, 1),
        lease("10.0.2.0-24", 2),
    ]));
    let written = async {
        while !std::fs::read_to_string(dir.path().join("control.json"))
            .is_ok_and(|text| text.contains("10.0.2.0"))
        {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(HOUR, written).await.unwrap();
    drop(node);
    fake.end_watch();
    for mood in [Mood::Away, Mood::Silent] {
        fake.script().mood = mood;
        let started = Instant::now();
        let node = start(&fake, options(Some(dir.path()))).await;
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "{mood:?}: {:?}",
            started.elapsed()
        );
        assert_eq!(node.published.lease.borrow().subnet, subnet(OWN));
        assert_eq!(node.published.peers.borrow().len(), 1);
        assert!(!node.published.peers.borrow().is_confirmed());
        assert!(!node.published.health.borrow().connected);
        let renewals = fake.script().renewals;
        sleep(Duration::from_secs(1)).await;
        assert!(
            fake.script().renewals > renewals,
            "{mood:?}: the cached lease is not confirmed"
        );
    }
    // A refusal is an answer: a config that was taken away is not taken from the cache.
    fake.script().mood = Mood::Refusing;
    let mut control = Control::new(fake.clone(), options(Some(dir.path())));
    assert!(timeout(HOUR, control.network_config()).await.is_err());
    // Nor is the lease of a node that has another address now.
    fake.script().mood = Mood::Away;
    let mut control = Control::new(fake.clone(), options(Some(dir.path())));
    let config = control.network_config().await;
    assert!(timeout(HOUR, control.acquire(&attrs(7), &config)).await.is_err());
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

/// A store that does as it is told.
struct Fake {
    script: Mutex<Script>,
    wake: tokio::sync::Notify,
}

#[derive(Default)]
struct Script {
    mood: Mood,
    config: &'static str,
    next_subnet: &'static str,
    renewals: usize,
    acquisitions: usize,
    /// What a look at the store shows: any lease, whatever it is asked for.
    shown: Option<Lease>,
    looks: Vec<Subnet>,
    /// How far its clock is ahead of ours.
    ahead: Duration,
    watches: usize,
    /// From which address to which.
    readdressed: Vec<(std::net::Ipv4Addr, std::net::Ipv4Addr)>,
    told: VecDeque<Told>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mood {
    #[default]
    Fine,
    /// Every request fails at once.
    Away,
    /// No request is ever answered.
    Silent,
    /// Every request is refused.
    Refusing,
    /// Renewals find the lease in other hands.
    Lost,
}

enum Told {
    Update(LeaseUpdate, Vec<Subnet>),
    Failure,
    End,
}

impl Fake {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            script: Mutex::new(Script {
                config: CONFIG,
                next_subnet: OWN,
                ..Script::default()
            }),
            wake: tokio::sync::Notify::new(),
        })
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// How often a lease was acquired and renewed.
    fn asked(&self) -> (usize, usize) {
        let script = self.script();
        (script.acquisitions, script.renewals)
    }

    fn tell(&self, update: LeaseUpdate) {
        self.script().told.push_back(Told::Update(update, Vec::new()));
        self.wake.notify_one();
    }

    /// A list in which some leases cannot be read.
    fn tell_of_rot(&self, leases: Vec<Lease>, rotten: &[&str]) {
        let unreadable = rotten.iter().map(|key| subnet(key)).collect();
        let told = Told::Update(LeaseUpdate::Snapshot(leases), unreadable);
        self.script().told.push_back(told);
        self.wake.notify_one();
    }

    fn fail_watch(&self) {
        self.script().told.push_back(Told::Failure);
        self.wake.notify_one();
    }

    fn end_watch(&self) {
        self.script().told.push_back(Told::End);
        self.wake.notify_one();
    }

    async fn answer<T>(
        &self,
        answer: impl FnOnce(&mut Script) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mood = self.script().mood;
        match mood {
            Mood::Fine | Mood::Lost => answer(&mut self.script()),
            Mood::Away => Err(away()),
            Mood::Silent => std::future::pending().await,
            Mood::Refusing => Err(StoreError::Refused {
                doing: "test",
                cause: "no".to_owned(),
            }),
        }
    }
}

impl Store for Fake {
    fn place(&self) -> String {
        "fake".to_owned()
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(self.answer(|script| Ok(script.config.to_owned())))
    }

    fn acquire<'a>(
        &'a self,
        attrs: &'a LeaseAttrs,
        _previous: Option<Subnet>,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        self.script().acquisitions += 1;
        Box::pin(self.answer(|script| Ok(later(day_lease(script.next_subnet, attrs), script.ahead))))
    }

    fn confirm<'a>(
        &'a self,
        _holder: Option<&'a Holder>,
        subnet: Subnet,
        _attrs: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        self.script().looks.push(subnet);
        Box::pin(self.answer(|script| Ok(script.shown.clone())))
    }

    fn renew<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Lease, StoreError>> {
        self.script().renewals += 1;
        let lost = self.script().mood == Mood::Lost;
        Box::pin(self.answer(move |script| {
            if lost {
                return Err(StoreError::LeaseLost {
                    subnet: lease.subnet,
                    cause: "a stranger has it".to_owned(),
                });
            }
            Ok(later(
                day_lease(&lease.subnet.to_string(), &lease.attrs),
                script.ahead,
            ))
        }))
    }

    fn readdress<'a>(
        &'a self,
        _holder: Option<&'a Holder>,
        lease: &'a Lease,
        formerly: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(self.answer(move |script| {
            script
                .readdressed
                .push((formerly.public_ip, lease.attrs.public_ip));
            Ok(day_lease(&lease.subnet.to_string(), &lease.attrs))
        }))
    }

    fn watch(&self, _since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        self.script().watches += 1;
        if self.script().mood == Mood::Away {
            return Box::pin(stream::once(async { Err(away()) }));
        }
        let told = stream::unfold((), move |()| async move {
            loop {
                let next = self.script().told.pop_front();
                match next {
                    Some(Told::Update(update, unreadable)) => {
                        let item = WatchItem {
                            update,
                            unreadable,
                            cursor: Cursor("1".to_owned()),
                        };
                        return Some((Ok(item), ()));
                    }
                    Some(Told::Failure) => return Some((Err(away()), ())),
                    Some(Told::End) => return None,
                    None => self.wake.notified().await,
                }
            }
        });
        told.boxed()
    }
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

fn away() -> StoreError {
    StoreError::Unavailable {
        doing: "test",
        place: "fake".to_owned(),
        cause: "away".to_owned(),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a store says in wall-clock time when a lease ends"
)]
fn day_lease(key: &str, attrs: &LeaseAttrs) -> Lease {
    Lease {
        subnet: subnet(key),
        attrs: attrs.clone(),
        expiration: Expiration::At(SystemTime::now() + HOUR * 24),
        created: None,
    }
}

fn later(mut lease: Lease, by: Duration) -> Lease {
    if let Expiration::At(end) = lease.expiration {
        lease.expiration = Expiration::At(end + by);
    }
    lease
}

fn lease(key: &str, i: u8) -> Lease {
    day_lease(key, &attrs(i))
}

fn subnet(key: &str) -> Subnet {
    key.parse().unwrap()
}

fn attrs(i: u8) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{i}\"}}").as_bytes()).unwrap()
}
