//! How long work takes on the device, by events.

use super::CudaError;
use super::driver::{Event, Stream};
use super::graph::Graph;

/// Times of repeated runs in microseconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// From unsorted times; at least one.
    pub fn new(mut times: Vec<f64>) -> Option<Self> {
        times.sort_by(f64::total_cmp);
        (!times.is_empty()).then_some(Samples(times))
    }

    /// The middle time; of an even number the mean of the two in the middle.
    pub fn median(&self) -> f64 {
        let n = self.0.len();
        (self.0[(n - 1) / 2] + self.0[n / 2]) / 2.0
    }

    /// The shortest time.
    pub fn min(&self) -> f64 {
        self.0[0]
    }

    /// The longest time.
    pub fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    /// The time that `share` of the runs (0 to 1) do not exceed.
    pub fn quantile(&self, share: f64) -> f64 {
        let last = self.0.len() - 1;
        self.0[((last as f64 * share).round() as usize).min(last)]
    }
}

/// A pair of events around work on a stream.
#[derive(Debug)]
pub struct Timer {
    start: Event,
    end: Event,
}

impl Timer {
    /// A timer for streams of the device of `stream`.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn new(stream: &Stream) -> Result<Self, CudaError> {
        Ok(Timer {
            start: stream.device().event(true)?,
            end: stream.device().event(true)?,
        })
    }

    /// Microseconds that the work submitted by `submit` takes on the device; waits for it.
    ///
    /// # Errors
    /// Any error of the work.
    pub fn time(
        &self,
        stream: &Stream,
        submit: impl FnOnce(&Stream) -> Result<(), CudaError>,
    ) -> Result<f64, CudaError> {
        stream.record(&self.start)?;
        submit(stream)?;
        stream.record(&self.end)?;
        self.end.synchronize()?;
        Ok(f64::from(self.end.elapsed_ms(&self.start)?) * 1e3)
    }
}

/// Times `runs` runs of `submit` after `warmup` untimed ones.
///
/// # Errors
/// Any error of the work.
///
/// # Panics
/// If `runs` is 0.
pub fn time_runs(
    stream: &Stream,
    warmup: usize,
    runs: usize,
    mut submit: impl FnMut(&Stream) -> Result<(), CudaError>,
) -> Result<Samples, CudaError> {
    let timer = Timer::new(stream)?;
    for _ in 0..warmup {
        submit(stream)?;
    }
    let times = (0..runs)
        .map(|_| timer.time(stream, &mut submit))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Samples::new(times).expect("at least one run"))
}

/// Microseconds of one replay of a graph. Each sample is `replays` replays back to back, so that the events' own
/// time does not count; the median of `samples` of them, divided, is the result.
///
/// # Errors
/// Any error of the work.
///
/// # Panics
/// If `samples` or `replays` is 0.
pub fn time_graph(
    stream: &Stream,
    graph: &Graph,
    samples: usize,
    replays: usize,
) -> Result<f64, CudaError> {
    assert!(replays > 0, "a sample has at least one replay");
    let run = |stream: &Stream| (0..replays).try_for_each(|_| graph.launch(stream));
    Ok(time_runs(stream, 2, samples, run)?.median() / replays as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_statistics() {
        let samples = Samples::new(vec![3.0, 1.0, 2.0, 10.0]).unwrap();
        assert_eq!(
            (samples.median(), samples.min(), samples.max()),
            (2.5, 1.0, 10.0)
        );
        assert_eq!(
            (
                samples.quantile(0.0),
                samples.quantile(0.34),
                samples.quantile(1.0)
            ),
            (1.0, 2.0, 10.0)
        );
        assert_eq!(Samples::new(vec![4.0]).unwrap().median(), 4.0);
        assert!(Samples::new(vec![]).is_none());
    }
}
