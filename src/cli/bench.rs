//! `kersey bench`: kersey measured against what it stands in for.
//!
//! Two runs that follow one another closely see the same machine; two that lie minutes apart may not. So contestants
//! take turns: one round measures each once, the order turning with every round, and what is reported is the ratio
//! within a round, its median over all rounds and its spread.
//!
//! Rates without loss are searched for (`--loss-free`) by each contestant in each round as well, so they are subject to
//! the same rule.

mod results;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use self::results::{LITTLE_LOSS, Metric, NO_LOSS, Raw, Report, Sample, Scenario, Spread, Switches, Unit};
use crate::addr::Mtu;
use crate::cli::progress::{Progress, table};
use crate::cli::tell::{say, say_aside};
use crate::host::ethtool::Switch;
use crate::lab::contestant::{self, Contestant, Kersey};
use crate::lab::interrupt;
use crate::lab::topology::{Plan, Wiring};
use crate::lab::traffic::cpu::MachineCpu;
use crate::lab::traffic::loss_free::{Limit, LossFree};
use crate::lab::traffic::tcp::{self, Bulk};
use crate::lab::traffic::udp::Flood;
use crate::lab::traffic::{End, latency};

/// Largest distance between rounds at which a median says something, relative to it.
const TRUSTED_SPREAD: f64 = 0.05;
/// Share of the machine others may use while it is measured.
const TRUSTED_BUSY_PERCENT: f64 = 5.0;
/// Share of time a host may take away from its guest before its measurements say more about the host.
const TRUSTED_STEAL_PERCENT: f64 = 2.0;

/// Measure kersey against other ways of carrying packets.
#[derive(Debug, Args)]
pub struct BenchOptions {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Against the kernel's VXLAN as flannel sets it up, or its SRv6, over one veth pair
    VsKernel(VsKernel),
}

#[derive(Debug, Args)]
struct VsKernel {
    /// How kersey's pair carries packets; with vxlan and srv6, mixed pairs of kersey and kernel are measured too, and
    /// with srv6 the kernel's SRv6 is the measure of all
    #[arg(long, default_value = "udp", value_name = "TYPE", value_parser = BACKENDS)]
    backend: String,
    /// Rounds; each measures every contestant once
    #[arg(long, default_value_t = 5, value_name = "N")]
    pairs: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 10.0, value_name = "S")]
    seconds: f64,
    /// Seconds before each TCP measurement
    #[arg(long, default_value_t = 3.0, value_name = "S")]
    warmup: f64,
    /// Numbers of TCP streams
    #[arg(long, default_value = "1,4", value_delimiter = ',', value_name = "N,…")]
    streams: Vec<usize>,
    /// TCP congestion controls
    #[arg(
        long,
        default_value = "cubic,bbr",
        value_delimiter = ',',
        value_name = "NAME,…"
    )]
    cc: Vec<String>,
    /// Kersey's offloads, towards the kernel and towards the network
    #[arg(long, default_value = "on", value_delimiter = ',', value_parser = switch, value_name = "on,off")]
    offloads: Vec<Switch>,
    /// Checksum and segmentation offload of the veth; off behaves like a wire
    #[arg(long, default_value = "on", value_delimiter = ',', value_parser = switch, value_name = "on,off")]
    underlay_offloads: Vec<Switch>,
    /// Generic receive offload of the veth; on behaves like most network cards
    #[arg(long, default_value = "off", value_delimiter = ',', value_parser = switch, value_name = "on,off")]
    underlay_gro: Vec<Switch>,
    /// MTU of the veth, bytes
    #[arg(long, default_value_t = 1500)]
    mtu: u16,
    /// Who is measured against the kernel's tunnel
    #[arg(long, value_enum, default_value_t = Contestant::Kersey, hide = true)]
    contender: Contestant,
    /// Measure the veth without any tunnel too
    #[arg(long)]
    with_veth: bool,
    /// Measure a loop too that copies between TUN device and socket and does nothing else: what is possible in userspace
    #[arg(long)]
    with_copies: bool,
    /// A further argument for the daemons; may be repeated
    #[arg(long = "daemon-arg", value_name = "ARG", allow_hyphen_values = true)]
    daemon_args: Vec<String>,
    /// Search for the highest rates at which no UDP datagram is lost, and at most 0.5 %
    #[arg(long)]
    loss_free: bool,
    /// Seconds of each trial of that search
    #[arg(long, default_value_t = 2.0, value_name = "S")]
    trial_seconds: f64,
    /// Write everything measured to a file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Two rounds of one second, cubic only, coarse search: a look, not a result
    #[arg(long)]
    quick: bool,
}

/// Kersey's backends that are tunnels.
const BACKENDS: [&str; 3] = ["udp", "vxlan", "srv6"];
/// How close a search without loss gets, relative to the rate.
const RESOLUTION: f64 = 0.03;
/// The same for a look.
const QUICK_RESOLUTION: f64 = 0.15;
/// Trials a search takes, for the estimate of the time it all takes.
const TRIALS: f64 = 14.0;

fn switch(text: &str) -> Result<Switch, &'static str> {
    match text {
        "on" => Ok(Switch::On),
        "off" => Ok(Switch::Off),
        _ => Err("neither on nor off"),
    }
}

fn word(switch: Switch) -> &'static str {
    match switch {
        Switch::On => "on",
        Switch::Off => "off",
    }
}

/// Runs `kersey bench`.
///
/// # Errors
/// We are not root, or a contestant cannot be set up or measured.
pub fn run(options: BenchOptions) -> Result<ExitCode> {
    ensure!(
        nix::unistd::Uid::effective().is_root(),
        "a bench needs root, to make network namespaces"
    );
    interrupt::catch()?;
    match options.what {
        What::VsKernel(options) => vs_kernel(options),
    }
}

/// Pairs of one node of each kind.
const MIXED: [Contestant; 2] = [Contestant::KerseyToKernel, Contestant::KernelToKersey];

fn vs_kernel(mut options: VsKernel) -> Result<ExitCode> {
    if options.quick {
        options.pairs = options.pairs.min(2);
        options.seconds = options.seconds.min(1.0);
        options.warmup = options.warmup.min(0.3);
        options.trial_seconds = options.trial_seconds.min(0.5);
        options.cc.truncate(1);
    }
    for name in &options.cc {
        tcp::has_congestion_control(name)?;
    }
    let mut contestants = vec![options.baseline(), options.contender];
    if options.backend != "udp" && options.contender == Contestant::Kersey {
        contestants.extend(MIXED);
    }
    if options.with_veth {
        contestants.push(Contestant::Veth);
    }
    if options.with_copies {
        ensure!(
            !options.underlay_offloads.contains(&Switch::Off) && options.mtu >= 1500,
            "--with-copies needs runs that arrive whole: --underlay-offloads on, and an MTU of at least 1500"
        );
        contestants.push(Contestant::Copies);
    }
    contestants.dedup();
    let folder = tempfile::Builder::new()
        .prefix(&crate::lab::cluster::folder_prefix(std::process::id()))
        .tempdir()
        .context("cannot make a folder")?;
    let mut report = Report {
        command: std::env::args().collect(),
        backend: options.backend.clone(),
        baseline: options.baseline(),
        kernel: nix::sys::utsname::uname()?
            .release()
            .to_string_lossy()
            .into_owned(),
        processors: std::thread::available_parallelism()?.get(),
        link_mtu: options.mtu,
        pairs: options.pairs,
        seconds: options.seconds,
        warmup_s: options.warmup,
        busy_before_percent: 0.0,
        scenarios: Vec::new(),
    };
    say_aside!(
        "kersey bench vs-kernel · {} backend · Linux {} · {} processors · MTU {} · {} rounds · about {} min\n",
        options.backend,
        report.kernel,
        report.processors,
        options.mtu,
        options.pairs,
        options.minutes(&contestants).ceil()
    );
    let progress = Progress::new();
    progress.check("this machine, left alone", || {
        let before = MachineCpu::now()?;
        interrupt::sleep(Duration::from_secs(1))?;
        let cpu = MachineCpu::now()? - before;
        let outcome = format!("{:.0} % busy", cpu.busy_percent());
        report.busy_before_percent = cpu.busy_percent();
        let quiet = cpu.busy_percent() <= TRUSTED_BUSY_PERCENT;
        Ok((
            (),
            if quiet {
                Ok(outcome)
            } else {
                Err(format!("{outcome}: results will say little"))
            },
        ))
    })?;
    for switches in options.scenarios() {
        let nth = report.scenarios.len();
        let scenario = options.scenario(&contestants, switches, folder.path(), &progress, nth)?;
        say!("\n{}", options.text(&scenario, &contestants));
        report.scenarios.push(scenario);
    }
    if let Some(path) = &options.json {
        let json = serde_json::to_vec_pretty(&report)?;
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
        say_aside!("everything measured: {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

impl VsKernel {
    /// The kernel's tunnel that the others are measured by.
    fn baseline(&self) -> Contestant {
        if self.backend == "srv6" {
            Contestant::KernelSeg6
        } else {
            Contestant::KernelVxlan
        }
    }

    /// Every combination of switches asked for.
    fn scenarios(&self) -> Vec<Switches> {
        let mut all = Vec::new();
        for &underlay_offloads in &self.underlay_offloads {
            for &underlay_gro in &self.underlay_gro {
                let of = |&kersey_offloads| Switches {
                    underlay_offloads,
                    underlay_gro,
                    kersey_offloads,
                };
                all.extend(self.offloads.iter().map(of));
            }
        }
        all
    }

    fn minutes(&self, contestants: &[Contestant]) -> f64 {
        let tcp = |streams: usize| (streams * self.cc.len()) as f64 * (self.warmup + self.seconds);
        let search = if self.loss_free {
            2.0 * TRIALS * (self.trial_seconds + 0.2)
        } else {
            0.0
        };
        let one = |contestant: &Contestant| {
            if MIXED.contains(contestant) {
                tcp(1)
            } else {
                tcp(self.streams.len()) + 3.0 * self.seconds + search
            }
        };
        let rounds = self.pairs * self.scenarios().len();
        contestants.iter().map(one).sum::<f64>() * rounds as f64 / 60.0
    }

    fn scenario(
        &self,
        contestants: &[Contestant],
        switches: Switches,
        folder: &Path,
        progress: &Progress,
        nth: usize,
    ) -> Result<Scenario> {
        let mut plan = Plan::private(&format!("bench{nth}"), 2);
        plan.wiring = Wiring::Pair;
        plan.mtu = Mtu::new(self.mtu.into())?;
        plan.offloads = switches.underlay_offloads;
        plan.gro = switches.underlay_gro;
        let topology = plan.build()?;
        contestant::prepare(self.baseline(), &topology)?;
        let mut arguments = self.daemon_args.clone();
        if switches.kersey_offloads == Switch::Off {
            for flag in ["--tun-tso", "--tun-uso", "--udp-gso", "--udp-gro"] {
                arguments.extend([flag.to_owned(), "off".to_owned()]);
            }
        }

        let mut scenario = Scenario {
            switches,
            steal_percent: 0.0,
            metrics: Vec::new(),
            sender_limited: Vec::new(),
            raw: Vec::new(),
        };
        let cpu = MachineCpu::now()?;
        for round in 1..=self.pairs {
            let mut order = contestants.to_vec();
            order.rotate_left((round - 1) % contestants.len());
            for contestant in order {
                let name = format!("round {round}, {}", contestant.name());
                let samples = progress.step(&name, || {
                    let folder = tempfile::tempdir_in(folder)?;
                    let kersey = Kersey {
                        backend: self.backend.clone(),
                        folder: folder.path().to_owned(),
                        arguments: arguments.clone(),
                    };
                    let running = contestant::start(contestant, &topology, &kersey)?;
                    let (one, two) = running.ends(&topology).context("a comparison takes 2 nodes")?;
                    let samples = self.measure(contestant, one, two, |found| match found {
                        Finding::Raw(test, report) => {
                            let test = test.to_owned();
                            scenario.raw.push(Raw {
                                round,
                                contestant,
                                test,
                                report,
                            });
                        }
                        Finding::SenderLimited(test) => scenario.note_sender(contestant, test),
                    })?;
                    let outcome = samples
                        .first()
                        .map(|(_, unit, value)| unit.show(*value))
                        .unwrap_or_default();
                    Ok((samples, outcome))
                })?;
                scenario.take(contestant, samples, contestants);
            }
        }
        scenario.steal_percent = (MachineCpu::now()? - cpu).steal_percent();
        for metric in &mut scenario.metrics {
            let baseline = self.baseline();
            let others = contestants.iter().filter(|&&of| of != baseline);
            let ratio = |&of: &Contestant| Some((of, metric.ratio_of(of, baseline)?));
            metric.ratios = others.filter_map(ratio).collect();
        }
        drop(topology);
        Ok(scenario)
    }

    /// Everything there is to measure about one contestant; of a mixed pair, one TCP stream.
    fn measure(
        &self,
        contestant: Contestant,
        one: End<'_>,
        two: End<'_>,
        mut found: impl FnMut(Finding<'_>),
    ) -> Result<Vec<Sample>> {
        let mixed = MIXED.contains(&contestant);
        let streams = if mixed { &[1] } else { self.streams.as_slice() };
        let duration = Duration::try_from_secs_f64(self.seconds).context("--seconds")?;
        let warmup = Duration::try_from_secs_f64(self.warmup).context("--warmup")?;
        let mut samples = Vec::new();
        for congestion in &self.cc {
            for &streams in streams {
                let plural = if streams == 1 { "" } else { "s" };
                let test = format!("TCP {streams} stream{plural}, {congestion}");
                let bulk = Bulk {
                    streams,
                    warmup,
                    duration,
                    congestion: Some(congestion.clone()),
                };
                let report = bulk.run(one, two).with_context(|| test.clone())?;
                found(Finding::Raw(&test, serde_json::to_value(&report)?));
                samples.push((test.clone(), Unit::GbitPerS, report.gbit_per_s));
                samples.push((
                    test.clone(),
                    Unit::CpuSPerGb,
                    report.cpu_s_per_gb.unwrap_or(f64::NAN),
                ));
                samples.push((test, Unit::Segments, report.retransmits as f64));
            }
        }
        if mixed {
            return Ok(samples);
        }
        for payload_bytes in [64, 1400] {
            let test = format!("UDP {payload_bytes} B");
            let flood = Flood {
                payload_bytes,
                rate: None,
                duration,
            };
            let report = flood.run(one, two).with_context(|| test.clone())?;
            found(Finding::Raw(&test, serde_json::to_value(&report)?));
            samples.push((test.clone(), Unit::PacketsPerS, report.received_per_s));
            samples.push((
                test,
                Unit::CpuUsPerPacket,
                report.cpu_us_per_packet.unwrap_or(f64::NAN),
            ));
            if self.loss_free {
                // What a flood gets through is near what can be had, from above.
                let search = self.search(payload_bytes, report.received_per_s)?;
                let names = [NO_LOSS, LITTLE_LOSS].map(|suffix| format!("UDP {payload_bytes} B{suffix}"));
                let report = search.run(one, two).with_context(|| names[0].clone())?;
                found(Finding::Raw(&names[0], serde_json::to_value(&report)?));
                for (name, result) in names.into_iter().zip([report.ndr, report.pdr]) {
                    if result.limit == Limit::Sender {
                        found(Finding::SenderLimited(&name));
                    }
                    let rate = result.received_per_s.unwrap_or(f64::NAN);
                    samples.push((name, Unit::PacketsPerS, rate));
                }
            }
        }
        let report = latency::measure(one, two, duration).context("round trip")?;
        found(Finding::Raw("round trip", serde_json::to_value(&report)?));
        samples.push(("UDP 64 B and back, p50".to_owned(), Unit::Us, report.p50_us));
        samples.push(("UDP 64 B and back, p99".to_owned(), Unit::Us, report.p99_us));
        Ok(samples)
    }

    fn search(&self, payload_bytes: usize, start: f64) -> Result<LossFree> {
        Ok(LossFree {
            payload_bytes,
            trial: Duration::try_from_secs_f64(self.trial_seconds).context("--trial-seconds")?,
            start: start as u32,
            resolution: if self.quick { QUICK_RESOLUTION } else { RESOLUTION },
        })
    }

    fn text(&self, scenario: &Scenario, contestants: &[Contestant]) -> String {
        let mut text = format!(
            "underlay offloads {}, GRO {} · kersey offloads {} · median of {} rounds of {} s · steal {:.1} %\n\n",
            word(scenario.switches.underlay_offloads),
            word(scenario.switches.underlay_gro),
            word(scenario.switches.kersey_offloads),
            self.pairs,
            self.seconds,
            scenario.steal_percent
        );
        let contender = self.contender.name();
        let baseline = self.baseline();
        let median = |metric: &Metric, contestant| {
            let spread = metric
                .samples_of(contestant)
                .and_then(|samples| Spread::of(samples.to_vec()));
            spread.map_or_else(|| "–".to_owned(), |spread| metric.unit.show(spread.median))
        };
        let compared = |contestant| {
            let rows = scenario.metrics.iter().map(|metric| {
                let (ratio, spread) = match metric.ratio(contestant) {
                    Some(ratio) => (ratio.show(), format!("{:.2} to {:.2}", ratio.min, ratio.max)),
                    None => ("–".to_owned(), "–".to_owned()),
                };
                [
                    metric.name.clone(),
                    median(metric, baseline),
                    median(metric, contestant),
                    ratio,
                    spread,
                ]
            });
            let head = ["", baseline.name(), contestant.name(), "ratio", "min to max"];
            table(head, &without_repeats(rows.collect()))
        };
        text += &compared(self.contender);
        for yardstick in [Contestant::Veth, Contestant::Copies] {
            if contestants.contains(&yardstick) && self.contender != yardstick {
                text += "\n";
                text += &compared(yardstick);
            }
        }
        let mixed = scenario.metrics.iter().filter_map(|metric| {
            let [there, back] = MIXED.map(|of| metric.samples_of(of).is_some_and(|found| !found.is_empty()));
            let [to_kernel, to_kersey] = MIXED.map(|of| {
                let ratio = metric.ratio(of);
                ratio.map_or_else(|| "–".to_owned(), Spread::show)
            });
            (there && back).then(|| {
                [
                    metric.name.clone(),
                    median(metric, baseline),
                    median(metric, Contestant::KerseyToKernel),
                    to_kernel,
                    median(metric, Contestant::KernelToKersey),
                    to_kersey,
                ]
            })
        });
        let mixed: Vec<_> = mixed.collect();
        if !mixed.is_empty() {
            let [there, back] = MIXED.map(Contestant::name);
            let head = ["mixed pairs", baseline.name(), there, "ratio", back, "ratio"];
            text += "\n";
            text += &table(head, &without_repeats(mixed));
        }
        text += &format!(
            "\n  ratio: {contender} over {} within a round; for time and CPU less is better\n  \
             ~ rounds differ by more than {} %\n",
            baseline.name(),
            TRUSTED_SPREAD * 100.0
        );
        if self.loss_free {
            text += &format!(
                "  no loss, ≤ 0.5 % lost: the highest rates found, in trials of {} s\n",
                self.trial_seconds
            );
            text += &scenario.limits();
        }
        if scenario.steal_percent > TRUSTED_STEAL_PERCENT {
            text += "  the host took processor time away: measure again\n";
        }
        text
    }
}

/// What a measurement has to say beside its samples.
enum Finding<'a> {
    /// A report as it came.
    Raw(&'a str, serde_json::Value),
    /// The sender could send no faster.
    SenderLimited(&'a str),
}

/// Blanks what the row above says already in the first column.
fn without_repeats<const N: usize>(mut rows: Vec<[String; N]>) -> Vec<[String; N]> {
    for nth in (1..rows.len()).rev() {
        if rows[nth][0] == rows[nth - 1][0] {
            rows[nth][0].clear();
        }
    }
    rows
}
