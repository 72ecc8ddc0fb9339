//! Choosing GEMM kernels by timing: for each shape and bucket the variants are timed on the model's
//! own weights, and one that is faster than the heuristic's and computes the same is entered into the
//! table that lowering reads. How a variant is timed is behind [`Bench`], so that the logic is tested
//! without a GPU.

use super::CudaError;
use super::timing::Samples;
use super::tuning_cache::{Entry, TuningCache};
use crate::progress::Counted;
use lathe_codegen::cuda::{Choices, GemmKey, Variant};
use std::time::{Duration, Instant};

/// Part of the heuristic's time that a variant may take at most to be chosen, and microseconds that it
/// must gain: between other kernels a smaller gain is as likely a loss.
const GAIN: f64 = 0.97;
const GAIN_MICROS: f64 = 0.5;
/// Relative error ‖y − y_heuristic‖ / ‖y_heuristic‖ up to which two bf16 kernels compute the same:
/// each output is rounded once, to 8 bits, whatever the order of the sums.
const TOLERANCE: f64 = 1e-2;
/// Variants that are timed a second time, turn by turn with the heuristic's.
const FINALISTS: usize = 3;
/// Turns of the second time.
const TURNS: usize = 3;

/// Runs variants of a GEMM.
pub(super) trait Bench {
    /// Compiles what [`Bench::time`] will run; a variant that does not compile is left out by it.
    fn prepare(&mut self, wanted: &[(GemmKey, Variant)]) -> Result<(), CudaError>;

    /// The library's variants of a GEMM, none without the library.
    fn library(&mut self, key: &GemmKey) -> Vec<Variant>;

    /// Microseconds of one GEMM with its norm; nothing if the variant cannot run.
    fn time(&mut self, key: &GemmKey, variant: Variant) -> Result<Option<f64>, CudaError>;

    /// Relative error of a variant's output to another's.
    fn error(
        &mut self,
        key: &GemmKey,
        variant: Variant,
        reference: Variant,
    ) -> Result<f64, CudaError>;
}

/// What tuning did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tuned {
    /// GEMM shapes, a shape counted for each bucket.
    pub shapes: usize,
    /// Of these, shapes timed now; the others were in the cache.
    pub timed: usize,
    /// Shapes for which another variant than the heuristic's was chosen.
    pub changed: usize,
    /// Shapes that were left to the heuristics because time was up.
    pub left: usize,
    /// Mean time of the chosen kernels over that of the heuristics', the heuristics' time counted.
    pub relative_time: f64,
    /// Wall time.
    pub seconds: f64,
}

/// Tunes `keys`, most important first: from the cache where it has them, else by timing until
/// `limit` is over. New entries go into the cache.
///
/// # Errors
/// The device fails.
pub(super) fn tune(
    bench: &mut dyn Bench,
    keys: &[GemmKey],
    sms: usize,
    cache: &mut TuningCache,
    limit: Duration,
) -> Result<(Choices, Tuned), CudaError> {
    let start = Instant::now();
    let mut tuned = Tuned {
        shapes: keys.len(),
        ..Tuned::default()
    };
    let unknown: Vec<&GemmKey> = keys
        .iter()
        .filter(|key| cached(cache, key, sms).is_none())
        .collect();
    // The bar goes when this does, however that comes.
    let mut progress = None;
    if !unknown.is_empty() {
        tracing::info!("autotune: {} of {} GEMM shapes", unknown.len(), keys.len());
        progress = Some(Counted::begin("autotune", unknown.len()));
        let mut wanted = Vec::new();
        for key in &unknown {
            let variants = Variant::candidates(key, sms);
            wanted.extend(variants.into_iter().map(|v| (**key, v)));
        }
        bench.prepare(&wanted)?;
    }
    for key in unknown {
        if start.elapsed() > limit {
            tuned.left += 1;
            continue;
        }
        if let Some(entry) = tune_one(bench, key, sms)? {
            tracing::debug!(
                "autotune: {key}: {} {:.1} us, heuristic {} {:.1} us",
                entry.variant,
                entry.nanoseconds as f64 * 1e-3,
                Variant::heuristic(key, sms),
                entry.heuristic_nanoseconds as f64 * 1e-3,
            );
            tuned.timed += 1;
            cache.insert(key, entry);
        }
        if let Some(progress) = &mut progress {
            progress.step();
        }
    }
    if tuned.timed > 0 {
        cache.save();
    }
    let (choices, mut sums) = (choices(cache, keys, sms), (0, 0));
    for key in keys {
        if let Some(entry) = cached(cache, key, sms) {
            // From a file: any number.
            sums.0 = u64::saturating_add(sums.0, entry.nanoseconds);
            sums.1 = u64::saturating_add(sums.1, entry.heuristic_nanoseconds);
        }
    }
    tuned.changed = choices.len();
    tuned.relative_time = match sums {
        (_, 0) => 1.0,
        (chosen, heuristic) => chosen as f64 / heuristic as f64,
    };
    tuned.seconds = start.elapsed().as_secs_f64();
    Ok((choices, tuned))
}

/// The choices that the cache has for these keys, as far as they differ from the heuristics'.
pub(super) fn choices(cache: &TuningCache, keys: &[GemmKey], sms: usize) -> Choices {
    let mut choices = Choices::default();
    for key in keys {
        if let Some(entry) = cached(cache, key, sms)
            && entry.variant != Variant::heuristic(key, sms)
        {
            choices.insert(*key, entry.variant);
        }
    }
    choices
}

/// An entry whose variant computes the GEMM.
fn cached(cache: &TuningCache, key: &GemmKey, sms: usize) -> Option<Entry> {
    let entry = cache.get(key)?;
    entry.variant.check(key, sms).is_ok().then_some(entry)
}

/// The fastest variant that computes what the heuristic's does; nothing if the heuristic's does not
/// run.
fn tune_one(bench: &mut dyn Bench, key: &GemmKey, sms: usize) -> Result<Option<Entry>, CudaError> {
    let mut variants = Variant::candidates(key, sms);
    variants.extend(bench.library(key));
    let heuristic = variants[0];
    let Some(base) = bench.time(key, heuristic)? else {
        return Ok(None);
    };
    let mut times = Vec::new();
    for &variant in &variants[1..] {
        if let Some(time) = bench.time(key, variant)? {
            times.push((time, variant));
        }
    }
    times.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let entry = |variant, time: f64, heuristic_time: f64| Entry {
        variant,
        nanoseconds: (time * 1e3) as u64,
        heuristic_nanoseconds: (heuristic_time * 1e3) as u64,
    };
    let is_faster = |time: f64, base: f64| time < base * GAIN && time < base - GAIN_MICROS;
    let faster = times.iter().take_while(|t| is_faster(t.0, base));
    for &(_, variant) in faster.take(FINALISTS) {
        // The clock moves with the power that is drawn: only turns compare.
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            ours.extend(bench.time(key, variant)?);
            theirs.extend(bench.time(key, heuristic)?);
        }
        let (Some(ours), Some(theirs)) = (Samples::new(ours), Samples::new(theirs)) else {
            continue;
        };
        if !is_faster(ours.median(), theirs.median()) {
            continue;
        }
        let error = bench.error(key, variant, heuristic)?;
        // A NaN is no small error.
        if error <= TOLERANCE {
            return Ok(Some(entry(variant, ours.median(), theirs.median())));
        }
        tracing::warn!("autotune: {key}: {variant} is off by {error:.1e} and not used");
    }
    Ok(Some(entry(heuristic, base, base)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::Epilogue;
    use std::collections::BTreeMap;

    const SMS: usize = 132;

    fn key(m: usize) -> GemmKey {
        GemmKey {
            m,
            n: 4096,
            k: 14336,
            norm: false,
            epilogue: Epilogue::Residual,
            bias: false,
        }
    }

    /// Times by variant; whatever is not listed takes 100 us.
    #[derive(Default)]
    struct Fake {
        times: BTreeMap<Variant, Vec<f64>>,
        errors: BTreeMap<Variant, f64>,
        absent: Vec<Variant>,
        library: Vec<Variant>,
        timed: usize,
    }

    impl Bench for Fake {
        fn prepare(&mut self, wanted: &[(GemmKey, Variant)]) -> Result<(), CudaError> {
            assert!(!wanted.is_empty());
            Ok(())
        }

        fn library(&mut self, _: &GemmKey) -> Vec<Variant> {
            self.library.clone()
        }

        fn time(&mut self, _: &GemmKey, variant: Variant) -> Result<Option<f64>, CudaError> {
            self.timed += 1;
            if self.absent.contains(&variant) {
                return Ok(None);
            }
            let Some(times) = self.times.get_mut(&variant) else {
                return Ok(Some(100.0));
            };
            // The last time stands for all further ones.
            Ok(Some(if times.len() > 1 {
                times.remove(0)
            } else {
                times[0]
            }))
        }

        fn error(&mut self, _: &GemmKey, v: Variant, _: Variant) -> Result<f64, CudaError> {
            Ok(self.errors.get(&v).copied().unwrap_or(1e-3))
        }
    }

    fn chosen(fake: &mut Fake) -> Variant {
        tune_one(fake, &key(384), SMS).unwrap().unwrap().variant
    }

    #[test]
    fn the_fastest_that_is_right_wins() {
        let all = Variant::candidates(&key(384), SMS);
        let mut fake = Fake::default();
        assert_eq!(chosen(&mut fake), all[0], "all the same: the heuristic's");
        fake.times.insert(all[1], vec![80.0]);
        fake.times.insert(all[2], vec![90.0]);
        assert_eq!(chosen(&mut fake), all[1]);
        fake.errors.insert(all[1], 0.5);
        assert_eq!(chosen(&mut fake), all[2], "a wrong one is passed over");
        fake.errors.insert(all[2], f64::NAN);
        assert_eq!(chosen(&mut fake), all[0], "a NaN is wrong");
    }

    #[test]
    fn noise_is_no_gain() {
        let all = Variant::candidates(&key(384), SMS);
        let mut fake = Fake::default();
        fake.times.insert(all[1], vec![99.0]);
        assert_eq!(chosen(&mut fake), all[0], "1 % is too little");
        // Fast once, then no faster than the heuristic's.
        fake.times.insert(all[1], vec![50.0, 101.0]);
        assert_eq!(chosen(&mut fake), all[0]);
        fake.times.insert(all[2], vec![60.0, 70.0]);
        assert_eq!(chosen(&mut fake), all[2], "the next finalist");
    }

    #[test]
    fn variants_that_do_not_run_are_left_out() {
        let all = Variant::candidates(&key(384), SMS);
        let library = Variant::CublasLt { algorithm: 2 };
        let mut fake = Fake {
            absent: vec![all[1]],
            library: vec![library],
            ..Fake::default()
        };
        fake.times.insert(library, vec![70.0]);
        assert_eq!(chosen(&mut fake), library);
        fake.absent.push(all[0]);
        assert_eq!(tune_one(&mut fake, &key(384), SMS).unwrap(), None);
    }

    #[test]
    fn what_is_cached_is_not_timed_again() {
        let dir = tempfile::tempdir().unwrap();
        let open = || TuningCache::open(Some(dir.path()), "one GPU");
        let keys = [key(320), key(384)];
        let variant = Variant::candidates(&keys[0], SMS)[1];
        let mut fake = Fake::default();
        fake.times.insert(variant, vec![50.0]);
        let limit = Duration::from_secs(60);
        let (first, tuned) = tune(&mut fake, &keys, SMS, &mut open(), limit).unwrap();
        assert_eq!(first.get(&keys[0]), Some(variant));
        assert_eq!((tuned.shapes, tuned.timed, tuned.left), (2, 2, 0));
        assert!(tuned.changed >= 1 && tuned.relative_time < 1.0);
        fake.timed = 0;
        let (second, tuned) = tune(&mut fake, &keys, SMS, &mut open(), limit).unwrap();
        assert_eq!((second, tuned.timed, fake.timed), (first, 0, 0));
        // A variant that a later version does not have is timed anew.
        let mut cache = open();
        let nonsense = Entry {
            variant: Variant::Gemv,
            ..cache.get(&keys[0]).unwrap()
        };
        cache.insert(&keys[0], nonsense);
        let (_, tuned) = tune(&mut fake, &keys, SMS, &mut cache, limit).unwrap();
        assert_eq!(tuned.timed, 1);
        // Times are what a file says.
        for key in &keys {
            let endless = Entry {
                nanoseconds: u64::MAX,
                ..cache.get(key).unwrap()
            };
            cache.insert(key, endless);
        }
        let (_, tuned) = tune(&mut fake, &keys, SMS, &mut cache, limit).unwrap();
        assert!(tuned.relative_time > 1.0);
    }

    #[test]
    fn when_time_is_up_the_heuristics_decide() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = TuningCache::open(Some(dir.path()), "one GPU");
        let mut fake = Fake::default();
        std::thread::sleep(Duration::from_millis(1));
        let (choices, tuned) =
            tune(&mut fake, &[key(320)], SMS, &mut cache, Duration::ZERO).unwrap();
        assert!(choices.is_empty());
        assert_eq!((tuned.left, fake.timed), (1, 0));
    }

    /// The only observer of this crate's tests; they run side by side, so it looks at one total.
    #[test]
    fn tuning_tells_how_far_it_is() {
        use crate::progress::{Observer, Unit, observe};
        use std::sync::Mutex;

        static TOLD: Mutex<Vec<Option<u64>>> = Mutex::new(Vec::new());
        struct Recorder;
        impl Observer for Recorder {
            fn advance(&self, task: &'static str, _: Unit, done: u64, total: u64) {
                if (task, total) == ("autotune", 5) {
                    TOLD.lock().unwrap().push(Some(done));
                }
            }
            fn end(&self, task: &'static str) {
                let mut told = TOLD.lock().unwrap();
                if task == "autotune" && !told.is_empty() {
                    told.push(None);
                }
            }
        }
        assert!(observe(Box::new(Recorder)));
        let dir = tempfile::tempdir().unwrap();
        let mut cache = TuningCache::open(Some(dir.path()), "one GPU");
        let keys: Vec<GemmKey> = (1..6).map(|i| key(64 * i)).collect();
        let limit = Duration::from_secs(60);
        let mut run = |fake: &mut Fake| tune(fake, &keys, SMS, &mut cache, limit).unwrap();
        run(&mut Fake::default());
        let told = TOLD.lock().unwrap().clone();
        // The end stands for the last; ends of other tests may come before it.
        let counted: Vec<u64> = told.iter().copied().flatten().collect();
        assert_eq!(counted, [0, 1, 2, 3, 4]);
        assert_eq!(told.last(), Some(&None));
        run(&mut Fake::default());
        let again = TOLD.lock().unwrap().iter().flatten().count();
        assert_eq!(again, 5, "nothing is timed, so nothing is told");
    }
}
