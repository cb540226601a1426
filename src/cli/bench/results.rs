//! What was measured, and what it comes to: samples, ratios within a round, and their spread.

use std::collections::BTreeMap;

use serde::Serialize;

use super::TRUSTED_SPREAD;
use crate::cli::progress::grouped;
use crate::host::ethtool::Switch;
use crate::lab::contestant::Contestant;

/// One measurement: a number for each metric it gives.
pub(super) type Sample = (String, Unit, f64);

/// Everything measured, for the JSON file.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) command: Vec<String>,
    pub(super) backend: String,
    /// What the others are measured by.
    pub(super) baseline: Contestant,
    pub(super) kernel: String,
    pub(super) processors: usize,
    pub(super) link_mtu: u16,
    pub(super) pairs: usize,
    pub(super) seconds: f64,
    pub(super) warmup_s: f64,
    /// What the machine did before any traffic.
    pub(super) busy_before_percent: f64,
    pub(super) scenarios: Vec<Scenario>,
}

/// What is on and what is off.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Switches {
    pub(super) underlay_offloads: Switch,
    pub(super) underlay_gro: Switch,
    pub(super) kersey_offloads: Switch,
}

/// One combination of switches.
#[derive(Debug, Serialize)]
pub(super) struct Scenario {
    #[serde(flatten)]
    pub(super) switches: Switches,
    pub(super) steal_percent: f64,
    pub(super) metrics: Vec<Metric>,
    /// Searches that ended because the sender could send no faster.
    pub(super) sender_limited: Vec<SenderLimited>,
    /// Each measurement as it came.
    pub(super) raw: Vec<Raw>,
}

#[derive(Debug, Serialize)]
pub(super) struct Raw {
    pub(super) round: usize,
    pub(super) contestant: Contestant,
    pub(super) test: String,
    pub(super) report: serde_json::Value,
}

/// One number, from every contestant in every round.
#[derive(Debug, Serialize)]
pub(super) struct Metric {
    pub(super) name: String,
    pub(super) unit: Unit,
    pub(super) samples: Vec<(Contestant, Vec<f64>)>,
    /// Each contestant over the kernel's tunnel, round by round.
    pub(super) ratios: Vec<(Contestant, Spread)>,
}

/// In how many rounds the sender was the limit of a search.
#[derive(Debug, Serialize)]
pub(super) struct SenderLimited {
    pub(super) contestant: Contestant,
    pub(super) test: String,
    pub(super) rounds: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Unit {
    #[serde(rename = "Gbit/s")]
    GbitPerS,
    #[serde(rename = "packets/s")]
    PacketsPerS,
    #[serde(rename = "us")]
    Us,
    #[serde(rename = "CPU-s/GB")]
    CpuSPerGb,
    #[serde(rename = "CPU-us/packet")]
    CpuUsPerPacket,
    #[serde(rename = "segments")]
    Segments,
}

impl Unit {
    pub(super) fn show(self, value: f64) -> String {
        match self {
            Self::GbitPerS => format!("{value:.2} Gbit/s"),
            Self::PacketsPerS => format!("{} packets/s", grouped(value as u64)),
            Self::Us => format!("{value:.1} µs"),
            Self::CpuSPerGb => format!("{value:.3} CPU-s/GB"),
            Self::CpuUsPerPacket => format!("{value:.1} CPU-µs/packet"),
            Self::Segments => format!("{value:.0} resent"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// The median, with a mark if it says little.
    pub(super) fn show(self) -> String {
        let mark = if self.is_wide() { "~ " } else { "" };
        format!("{mark}{:.2}", self.median)
    }

    /// Whether rounds differ more than a result may.
    pub(super) fn is_wide(self) -> bool {
        self.max - self.min > TRUSTED_SPREAD * self.median
    }

    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let upper = values.len() / 2;
        let lower = (values.len() - 1) / 2;
        let median = f64::midpoint(values[lower], values[upper]);
        Some(Self { median, min, max })
    }
}

pub(super) const NO_LOSS: &str = ", no loss";
pub(super) const LITTLE_LOSS: &str = ", ≤ 0.5 % lost";

/// Whether a test is the result of a search for a rate.
pub(super) fn is_search(test: &str) -> bool {
    [NO_LOSS, LITTLE_LOSS].iter().any(|suffix| test.ends_with(suffix))
}

impl Scenario {
    pub(super) fn note_sender(&mut self, contestant: Contestant, test: &str) {
        let mut known = self.sender_limited.iter_mut();
        match known.find(|known| known.contestant == contestant && known.test == test) {
            Some(known) => known.rounds += 1,
            None => self.sender_limited.push(SenderLimited {
                contestant,
                test: test.to_owned(),
                rounds: 1,
            }),
        }
    }

    /// Where the sender, not loss, ended searches: whose, and how many of how many.
    pub(super) fn limits(&self) -> String {
        let searches = |contestant| {
            let rates = self.metrics.iter().filter(|metric| is_search(&metric.name));
            let samples = rates.filter_map(|metric| metric.samples_of(contestant));
            samples.map(<[f64]>::len).sum::<usize>()
        };
        let mut ended = BTreeMap::new();
        for found in &self.sender_limited {
            *ended.entry(found.contestant).or_insert(0) += found.rounds;
        }
        let line = |(contestant, ended): (Contestant, usize)| {
            format!(
                "    {}: {ended} of {} searches ended because the sender could send no faster\n",
                contestant.name(),
                searches(contestant)
            )
        };
        ended.into_iter().map(line).collect()
    }

    pub(super) fn take(&mut self, contestant: Contestant, samples: Vec<Sample>, contestants: &[Contestant]) {
        for (name, unit, value) in samples {
            let nth = self
                .metrics
                .iter()
                .position(|metric| metric.name == name && metric.unit == unit)
                .unwrap_or_else(|| {
                    self.metrics.push(Metric {
                        name,
                        unit,
                        samples: contestants
                            .iter()
                            .map(|&contestant| (contestant, Vec::new()))
                            .collect(),
                        ratios: Vec::new(),
                    });
                    self.metrics.len() - 1
                });
            let mut columns = self.metrics[nth].samples.iter_mut();
            if let Some((_, column)) = columns.find(|(of, _)| *of == contestant) {
                column.push(value);
            }
        }
    }
}

impl Metric {
    pub(super) fn samples_of(&self, contestant: Contestant) -> Option<&[f64]> {
        let column = self.samples.iter().find(|(of, _)| *of == contestant);
        column.map(|(_, samples)| samples.as_slice())
    }

    /// A contestant over the kernel's tunnel.
    pub(super) fn ratio(&self, contestant: Contestant) -> Option<Spread> {
        let mut ratios = self.ratios.iter();
        ratios.find(|(of, _)| *of == contestant).map(|(_, ratio)| *ratio)
    }

    /// Resent segments are no ratio's business: the good case is zero.
    pub(super) fn ratio_of(&self, above: Contestant, below: Contestant) -> Option<Spread> {
        if self.unit == Unit::Segments {
            return None;
        }
        let (above, below) = (self.samples_of(above)?, self.samples_of(below)?);
        Spread::of(
            above
                .iter()
                .zip(below)
                .map(|(above, below)| above / below)
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        let spread = Spread::of(vec![4.0, 1.0, f64::NAN, 2.0, 3.0]).unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.5, 4.0));
        assert_eq!(Spread::of(vec![f64::NAN]), None);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let metric = Metric {
            name: "TCP".to_owned(),
            unit: Unit::GbitPerS,
            samples: vec![
                (Contestant::KernelVxlan, vec![10.0, 20.0]),
                (Contestant::Kersey, vec![5.0, 10.0]),
            ],
            ratios: Vec::new(),
        };
        let ratio = metric
            .ratio_of(Contestant::Kersey, Contestant::KernelVxlan)
            .unwrap();
        assert_eq!((ratio.min, ratio.max), (0.5, 0.5));
    }

    #[test]
    fn samples_find_their_row_whoever_measured_less() {
        let mut scenario = scenario();
        let contestants = [Contestant::KernelVxlan, Contestant::KerseyToKernel];
        let sample = |name: &str, unit, value| (name.to_owned(), unit, value);
        let mixed = vec![sample("TCP", Unit::GbitPerS, 3.0)];
        let whole = vec![
            sample("UDP", Unit::PacketsPerS, 7.0),
            sample("TCP", Unit::CpuSPerGb, 0.5),
            sample("TCP", Unit::GbitPerS, 6.0),
        ];
        scenario.take(Contestant::KerseyToKernel, mixed, &contestants);
        scenario.take(Contestant::KernelVxlan, whole, &contestants);

        let of = |nth: usize, contestant| scenario.metrics[nth].samples_of(contestant).unwrap().to_vec();
        assert_eq!(of(0, Contestant::KernelVxlan), [6.0]);
        assert_eq!(of(0, Contestant::KerseyToKernel), [3.0]);
        assert_eq!(of(1, Contestant::KernelVxlan), [7.0]);
        assert_eq!(of(1, Contestant::KerseyToKernel), [] as [f64; 0]);
        let ratio = scenario.metrics[0].ratio_of(Contestant::KerseyToKernel, Contestant::KernelVxlan);
        assert_eq!(ratio.unwrap().median, 0.5);
        let none = scenario.metrics[1].ratio_of(Contestant::KerseyToKernel, Contestant::KernelVxlan);
        assert_eq!(none, None);
    }

    #[test]
    fn what_limited_searches_is_counted() {
        let mut scenario = scenario();
        assert_eq!(scenario.limits(), "");
        let samples = |rate| {
            let rate = |suffix| (format!("UDP 64 B{suffix}"), Unit::PacketsPerS, rate);
            vec![rate(NO_LOSS), rate(LITTLE_LOSS), rate("")]
        };
        for rate in [1.0, 2.0] {
            scenario.take(Contestant::Kersey, samples(rate), &[Contestant::Kersey]);
        }
        for test in ["UDP 64 B, no loss", "UDP 64 B, ≤ 0.5 % lost", "UDP 64 B, no loss"] {
            scenario.note_sender(Contestant::Kersey, test);
        }
        let text = scenario.limits();
        assert!(
            text.trim().starts_with("kersey: 3 of 4 searches ended because"),
            "{text}"
        );
    }

    fn scenario() -> Scenario {
        Scenario {
            switches: Switches {
                underlay_offloads: Switch::On,
                underlay_gro: Switch::Off,
                kersey_offloads: Switch::On,
            },
            steal_percent: 0.0,
            metrics: Vec::new(),
            sender_limited: Vec::new(),
            raw: Vec::new(),
        }
    }
}
