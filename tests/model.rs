//! F26: five nodes, a store and the clock in one process, and everything that can go wrong between them, in any order.
//!
//! The nodes are the product's own life cycle over the product's own allocation; the store is a model of one
//! ([`world`]). After each step: nobody took a subnet that another held (I3), and no node's table lost a peer that the
//! store did not tell it is gone. At the end all is mended, and every node's table is what the store holds (I1).
//!
//! `KERSEY_SOAK=1` runs 10,000 sequences of 200 steps, `KERSEY_SOAK=N` N of them.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[path = "model/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kersey::control::store::LocalStore;
use kersey::control::{Control, ControlOptions, Published};
use kersey::lease::{LeaseAttrs, Subnet};
use proptest::prelude::*;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use world::{Failure, Link, Way, World};

/// Sixteen subnets, of which the first is not handed out.
const CONFIG: &str = r#"{"Network":"10.0.0.0/24","SubnetLen":28}"#;
const NODES: usize = 5;
const TTL: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
enum Step {
    Wait(u64),
    Cut(usize, bool),
    Heal(usize),
    Kill(usize),
    Start(usize),
    StoreDown,
    StoreUp,
    Wipe,
    BackUp,
    Restore,
    Compact,
    /// Somebody deletes a node's lease.
    Delete(usize),
    /// A stranger overwrites a node's lease.
    Squat(usize),
    Fail(usize, bool),
}

fn any_step() -> impl Strategy<Value = Step> {
    let node = 0..NODES;
    prop_oneof![
        4 => prop_oneof![0_u64..5, 5_u64..200].prop_map(Step::Wait),
        3 => (node.clone(), any::<bool>()).prop_map(|(node, silent)| Step::Cut(node, silent)),
        3 => node.clone().prop_map(Step::Heal),
        1 => node.clone().prop_map(Step::Kill),
        2 => node.clone().prop_map(Step::Start),
        1 => Just(Step::StoreDown),
        2 => Just(Step::StoreUp),
        1 => Just(Step::Wipe),
        1 => Just(Step::BackUp),
        1 => Just(Step::Restore),
        2 => Just(Step::Compact),
        2 => node.clone().prop_map(Step::Delete),
        2 => node.clone().prop_map(Step::Squat),
        3 => (node, any::<bool>()).prop_map(|(node, answer)| Step::Fail(node, answer)),
    ]
}

fn size() -> (u32, usize) {
    match std::env::var("KERSEY_SOAK").ok().map(|text| text.parse()) {
        None => (100, 40),
        Some(Ok(sequences)) if sequences > 1 => (sequences, 200),
        Some(_) => (10_000, 200),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: size().0, max_shrink_iters: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_no_subnet_has_two_owners_and_nobody_vanishes_untold(
        steps in prop::collection::vec(any_step(), 0..size().1)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(play(&steps))?;
    }
}

async fn play(steps: &[Step]) -> Result<(), TestCaseError> {
    let world = World::new(CONFIG, TTL);
    let clock = tokio::spawn(Arc::clone(&world).keep_time());
    let mut nodes: Vec<Node> = (0..NODES).map(|i| Node::new(&world, i)).collect();
    let mut strangers = 0;
    for node in &mut nodes {
        node.start().await;
    }
    sleep(Duration::from_secs(1)).await;
    for step in steps {
        for node in &mut nodes {
            node.settle().await;
        }
        let before: Vec<BTreeSet<Subnet>> = nodes.iter().map(Node::peers).collect();
        match *step {
            Step::Wait(seconds) => sleep(Duration::from_secs(seconds)).await,
            Step::Cut(node, true) => nodes[node].link.set_way(Way::Silent),
            Step::Cut(node, false) => nodes[node].link.set_way(Way::Refusing),
            Step::Heal(node) => nodes[node].link.set_way(Way::Open),
            Step::Kill(node) => {
                nodes[node].settle().await;
                nodes[node].kill();
            }
            Step::Start(node) => nodes[node].start().await,
            Step::StoreDown => world.set_up(false),
            Step::StoreUp => world.set_up(true),
            Step::Wipe => world.wipe(),
            Step::BackUp => world.back_up(),
            Step::Restore => world.restore(),
            Step::Compact => world.compact(),
            Step::Delete(node) => world.delete_of(&nodes[node].attrs),
            // Not more strangers than there is room for beside the nodes.
            Step::Squat(node) if strangers < 8 => {
                if let Some(subnet) = nodes[node].own() {
                    strangers += 1;
                    world.overwrite(subnet, &attrs(100 + strangers));
                }
            }
            Step::Squat(_) => {}
            Step::Fail(node, answer) => {
                nodes[node].link.fail_next(if answer {
                    Failure::Answer
                } else {
                    Failure::Question
                });
            }
        }
        sleep(Duration::from_millis(200)).await;
        prop_assert_eq!(world.faults(), Vec::<String>::new());
        for (node, before) in nodes.iter().zip(before) {
            if !node.is_running() {
                continue;
            }
            let now = node.peers();
            let told = node.link.may_be_gone();
            let (own, entries) = (node.own(), world.entries());
            let ours = |subnet: &Subnet| {
                entries
                    .get(subnet)
                    .is_some_and(|held| held.same_node(&node.attrs))
            };
            let vanished: Vec<_> = before
                .difference(&now)
                // A subnet that passed to the node itself is no peer of it, be it in use or an old one come back.
                .filter(|subnet| !told.contains(subnet) && Some(**subnet) != own && !ours(subnet))
                .collect();
            prop_assert!(
                vanished.is_empty(),
                "{:?} vanished from node {}",
                vanished,
                node.number
            );
        }
    }
    world.set_up(true);
    for node in &mut nodes {
        node.link.set_way(Way::Open);
        node.link.forget_failures();
        node.start().await;
    }
    // Longer than strangers live, peers linger, and the list is renewed.
    sleep(Duration::from_secs(500)).await;
    for node in &mut nodes {
        node.settle().await;
    }
    let entries = world.entries();
    prop_assert_eq!(world.faults(), Vec::<String>::new());
    for node in &nodes {
        let own = node.own().unwrap();
        prop_assert_eq!(
            entries.get(&own),
            Some(&node.attrs),
            "node {} has {}",
            node.number,
            own
        );
        let others: BTreeSet<Subnet> = entries
            .iter()
            .filter(|(_, held)| !held.same_node(&node.attrs))
            .map(|(subnet, _)| *subnet)
            .collect();
        prop_assert_eq!(node.peers(), others, "node {}", node.number);
    }
    clock.abort();
    Ok(())
}

struct Node {
    number: usize,
    link: Link,
    attrs: LeaseAttrs,
    running: Option<(Published, JoinHandle<()>)>,
    starting: Option<JoinHandle<(Published, JoinHandle<()>)>>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Node {
    fn new(world: &Arc<World>, number: usize) -> Self {
        Self {
            number,
            link: Link::new(world),
            attrs: attrs(number),
            running: None,
            starting: None,
        }
    }

    /// Starts the node unless it runs. It is up once the store lets it.
    async fn start(&mut self) {
        self.settle().await;
        if self.running.is_some() || self.starting.is_some() {
            return;
        }
        let (link, attrs) = (self.link.clone(), self.attrs.clone());
        self.starting = Some(tokio::spawn(async move {
            let options = ControlOptions {
                renew_margin: TTL / 3,
                subnet_file: "/nonexistent/subnet.env".into(),
                linger: Duration::from_secs(30),
                ..ControlOptions::default()
            };
            let mut control = Control::new(Arc::new(LocalStore::new(link)), options);
            let config = control.network_config().await;
            let lease = control.acquire(&attrs, &config).await;
            let (publish, published) = control.channels(&config, &lease);
            (published, tokio::spawn(control.maintain(publish)))
        }));
        sleep(Duration::from_millis(200)).await;
        self.settle().await;
    }

    async fn settle(&mut self) {
        if self.starting.as_ref().is_some_and(JoinHandle::is_finished)
            && let Some(started) = self.starting.take()
        {
            self.running = Some(started.await.unwrap());
        }
    }

    fn kill(&mut self) {
        if let Some((_, task)) = self.running.take() {
            task.abort();
        }
        if let Some(task) = self.starting.take() {
            task.abort();
        }
    }

    fn is_running(&self) -> bool {
        self.running.is_some()
    }

    fn own(&self) -> Option<Subnet> {
        self.running
            .as_ref()
            .map(|(published, _)| published.lease.borrow().subnet)
    }

    fn peers(&self) -> BTreeSet<Subnet> {
        match &self.running {
            Some((published, _)) => published
                .peers
                .borrow()
                .iter()
                .map(|(subnet, _)| subnet)
                .collect(),
            None => BTreeSet::new(),
        }
    }
}

fn attrs(number: usize) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{}\"}}", number + 1).as_bytes()).unwrap()
}
