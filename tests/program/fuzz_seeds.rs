//! The fuzz targets on a stable compiler: each seed as it is, and seeds that are changed at random. `cargo fuzz` runs
//! the same bodies with coverage (tests/fuzz/README.md).

#[path = "../fuzz/bodies.rs"]
mod bodies;

use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The seeds of a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds");
    let mut paths: Vec<_> = std::fs::read_dir(folder.join(target))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has no seeds");
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

/// What separates or ends something in one of the formats, and numbers at the ends of their ranges.
const PIECES: [&[u8]; 32] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"(",
    b")",
    b"\"",
    b"'",
    b",",
    b":",
    b"\n",
    b" ",
    b"-",
    b"%",
    b"0",
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"9223372036854775807",
    b"4294967296",
    b"2147483648",
    b"null",
    b"true",
    b"\\u0000",
    b"\\u202e",
    b"\x00",
    b"\x1b",
    b"\xff",
    b"\xe2\x80\xae",
    b"{%",
    b"%}",
    b"\\",
];

/// Changes a text in one to eight places; `other` lends a piece now and then.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut StdRng) {
    for _ in 0..1 << random.random_range(0..4) {
        let at = random.random_range(0..=bytes.len());
        let most = 1 << random.random_range(0..7);
        let end = (at + random.random_range(0..=most)).min(bytes.len());
        match random.random_range(0..7) {
            0 => drop(bytes.drain(at..end)),
            1 => {
                let piece = PIECES[random.random_range(0..PIECES.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            2 => {
                let piece = PIECES[random.random_range(0..PIECES.len())];
                bytes.splice(at..end, piece.iter().copied());
            }
            3 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            4 if at < bytes.len() => bytes[at] = random.random(),
            5 => {
                let copy = bytes[at..end].to_vec();
                let to = random.random_range(0..=bytes.len());
                bytes.splice(to..to, copy);
            }
            _ => {
                let from = random.random_range(0..=other.len());
                let to = (from + random.random_range(0..64)).min(other.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
        }
    }
    bytes.truncate(16 << 10);
}

/// Runs a target on changed seeds until the time or the number of executions is up; returns how many there were. An
/// input that fails lies in `failing` of the temporary folder afterwards.
fn run(name: &str, body: fn(&[u8]), seed: u64, most: u64, time: Duration) -> u64 {
    let seeds = seeds(name);
    let start = Instant::now();
    let mut random = StdRng::seed_from_u64(seed);
    for n in 0..most {
        if n % 64 == 0 && start.elapsed() >= time {
            return n;
        }
        let mut bytes = seeds[random.random_range(0..seeds.len())].clone();
        let other = &seeds[random.random_range(0..seeds.len())];
        mutate(&mut bytes, other, &mut random);
        let began = Instant::now();
        if let Err(panic) = std::panic::catch_unwind(|| body(&bytes)) {
            let path = std::env::temp_dir().join(format!("failing-{name}"));
            let kept = std::fs::write(&path, &bytes);
            eprintln!(
                "{name}: execution {n} of seed {seed} fails, {} {kept:?}",
                path.display()
            );
            std::panic::resume_unwind(panic);
        }
        let took = began.elapsed();
        assert!(
            took < Duration::from_secs(10),
            "{name}: {took:?} for {bytes:?}"
        );
    }
    most
}

#[test]
fn seeds_and_some_changes_of_them() {
    for (name, body) in bodies::TARGETS {
        for bytes in seeds(name) {
            body(&bytes);
        }
        run(name, body, 1, 1000, Duration::from_secs(2));
    }
}

/// `LATHE_FUZZ_SECONDS=600 cargo test --workspace --test program -- --ignored --nocapture fuzz_seeds::for_as_long`
#[test]
#[ignore = "takes as long as it is given"]
fn for_as_long_as_you_like() {
    let seconds = std::env::var("LATHE_FUZZ_SECONDS").map_or(60, |s| s.parse().unwrap());
    let seed = std::env::var("LATHE_FUZZ_SEED").map_or(2, |s| s.parse().unwrap());
    let each = Duration::from_secs(seconds) / bodies::TARGETS.len() as u32;
    let mut all = 0;
    for (name, body) in bodies::TARGETS {
        let n = run(name, body, seed, u64::MAX, each);
        println!("{name}: {n} executions");
        all += n;
    }
    println!("{all} executions");
}
