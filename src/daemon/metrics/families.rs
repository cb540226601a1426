//! Writing families of metrics: all series of one name together, behind its description.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::daemon::report::Batches;
use crate::dataplane::stats::BATCH_BOUNDS;

/// Labels of a series: name and value.
pub(super) type Labels = Vec<(&'static str, String)>;

/// The sizes of many things: how many there were up to each bound and above the one before.
#[derive(Debug)]
pub(super) struct Sizes {
    buckets: Vec<(f64, u64)>,
    sum: f64,
}

impl Sizes {
    pub(super) fn of(batches: &Batches) -> Self {
        let bounds = BATCH_BOUNDS.into_iter().map(f64::from).chain([f64::INFINITY]);
        Self {
            buckets: bounds.zip(batches.sizes).collect(),
            sum: batches.packets as f64,
        }
    }
}

impl EncodeMetric for Sizes {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        // The counters go on counting while they are read; what is told is told of one reading.
        let count = self.buckets.iter().map(|(_, n)| n).sum();
        encoder.encode_histogram::<NoLabelSet>(self.sum, count, &self.buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// Writes families of metrics; one without series is left out.
pub(super) struct Families<'a, 'b>(pub(super) &'a mut DescriptorEncoder<'b>);

impl Families<'_, '_> {
    pub(super) fn counters(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels, u64)>,
    ) -> fmt::Result {
        let series = series
            .into_iter()
            .map(|(labels, n)| (labels, ConstCounter::new(n)));
        self.write(name, help, MetricType::Counter, series)
    }

    pub(super) fn gauges(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        let series = series
            .into_iter()
            .map(|(labels, value)| (labels, ConstGauge::new(value)));
        self.write(name, help, MetricType::Gauge, series)
    }

    pub(super) fn histograms(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels, Sizes)>,
    ) -> fmt::Result {
        self.write(name, help, MetricType::Histogram, series)
    }

    fn write(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        series: impl IntoIterator<Item = (Labels, impl EncodeMetric)>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        let mut family = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in series {
            value.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
