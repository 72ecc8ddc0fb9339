//! What somebody else can hand to the program: references that let everything pass, readers that go away, templates that
//! take all they can get, files without end, names that are commands to a terminal, limits of the system.
#![cfg(unix)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lathe_runtime::text::sandbox::ARGUMENT;
use lathe_runtime::text::{ChatMessage, ChatTemplate, Sandbox, SpecialTokens};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

const LATHE: &str = env!("CARGO_BIN_EXE_lathe");

/// A folder with a model `m`, a dataset, and a copy of the program's name for shells.
struct Case(tempfile::TempDir);

impl Case {
    fn new() -> Case {
        let case = Case(tempfile::tempdir().unwrap());
        std::fs::create_dir(case.at("m")).unwrap();
        let golden = crate::common::golden("llama-rope3-tied");
        for file in ["config.json", "model.safetensors", "golden.safetensors"] {
            std::fs::copy(golden.join(file), case.at("m").join(file)).unwrap();
        }
        let line = r#"{"task_id": 0, "input_ids": [1, 2, 3], "output_tokens": 4}"#;
        case.write("d.jsonl", line);
        case
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        std::fs::write(self.at(name), text).unwrap();
    }

    /// Runs a command of a shell, in which `lathe` is the program.
    fn shell(&self, line: &str) -> Output {
        Command::new("bash")
            .current_dir(self.0.path())
            .args(["-c", &format!("lathe() {{ {LATHE} \"$@\"; }}; {line}")])
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// The single line of a run that fails with 1 within some seconds.
    fn fails(&self, line: &str) -> String {
        let start = Instant::now();
        let output = self.shell(line);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line}: {error}");
        assert!(error.starts_with("error: "), "{line}: {error}");
        assert_eq!(error.lines().count(), 1, "{line}: {error}");
        assert!(start.elapsed() < Duration::from_secs(60), "{line}");
        error.trim_end()["error: ".len()..].to_owned()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

const VERIFY: &str = "lathe -m m --device cpu --dtype float32 verify";
const BENCHMARK: &str = "lathe -m m --device cpu throughput --dataset d.jsonl";

/// The reference of the model with one tensor's bytes changed.
fn damage(case: &Case, name: &str, change: impl Fn(&mut Vec<u8>)) {
    let path = crate::common::golden("llama-rope3-tied").join("golden.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let changed: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(tensor, view)| {
            let mut data = view.data().to_vec();
            if tensor == name {
                change(&mut data);
            }
            (tensor, view.dtype(), view.shape().to_vec(), data)
        })
        .collect();
    let views = changed.iter().map(|(name, dtype, shape, data)| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    case.write("m/golden.safetensors", bytes);
}

#[test]
fn garbage_weights_pass_no_comparison() {
    let case = Case::new();
    assert!(case.shell(VERIFY).status.success());
    // Every weight is another number.
    let path = case.at("m/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for (i, byte) in bytes[header..].iter_mut().enumerate() {
        *byte ^= (i % 7) as u8;
    }
    std::fs::write(&path, bytes).unwrap();
    assert!(case.fails(VERIFY).contains("is past the limit"));

    damage(&case, "logits_bf16", |data| {
        let nan = f32::NAN.to_le_bytes();
        let n = data.len();
        data[n - 4..].copy_from_slice(&nan);
    });
    let error = case.fails(VERIFY);
    let expected = "m/golden.safetensors: logits_bf16 have NaN at index ";
    assert!(error.starts_with(expected), "{error}");
    damage(&case, "logits", |data| data.fill(0));
    let error = case.fails(VERIFY);
    let expected = "m/golden.safetensors: logits are all zero";
    assert!(error.starts_with(expected), "{error}");
    damage(&case, "logits", |data| {
        let infinite = f32::INFINITY.to_le_bytes();
        data[8..12].copy_from_slice(&infinite);
    });
    let error = case.fails(VERIFY);
    assert!(error.contains("logits have inf at index 2"), "{error}");
    damage(&case, "", |_| {});
    for limit in ["nan", "inf", "-1", "0", "0.11", "1e9"] {
        let output = case.shell(&format!("{VERIFY} --rtol {limit}"));
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{limit}: {error}");
        assert!(error.contains("above 0, at most 0.1"), "{limit}: {error}");
    }
    let error = case.fails(&format!("{VERIFY} --rtol 0.1"));
    assert!(error.contains("is past the limit"), "{error}");
}

/// Whoever reads stderr may go away or be full: the report is there.
#[test]
fn a_report_does_not_depend_on_stderr() {
    let case = Case::new();
    for stderr in ["2>/dev/full", "2> >(true)", "2>&-", "2> >(head -1 >&2)"] {
        for more in ["--log_level debug", "--log_level debug --log_format json"] {
            let line = BENCHMARK.replace("-m m", &format!("-m m {more}"));
            let output = case.shell(&format!("{line} --report_json r.json {stderr}; exit $?"));
            let report = text(&output.stdout);
            assert!(output.status.success(), "{stderr} {more}");
            assert!(report.contains("Request Throughput"), "{stderr}: {report}");
            std::fs::remove_file(case.at("r.json")).unwrap();
        }
    }
    // An error has nowhere to go, but its exit code.
    for stderr in ["2>/dev/full", "2>&-"] {
        let output = case.shell(&format!("lathe -m none doctor --no_such_flag {stderr}"));
        assert_eq!(output.status.code(), Some(2), "{stderr}");
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let case = Case::new();
    for command in [
        "passes",
        "--help",
        "--version",
        "-m m compile --target h100",
    ] {
        let error = case.fails(&format!("lathe {command} >/dev/full"));
        assert!(error.contains("No space left on device"), "{error}");
        let error = case.fails(&format!("lathe {command} >&-"));
        assert!(error.starts_with("standard output is closed"), "{error}");
    }
    let output = case.shell("lathe passes >/dev/null; lathe passes | true; exit ${PIPESTATUS[0]}");
    assert!(output.status.success());
}

/// What a template takes beyond its limits ends its own process, and the program says why.
#[test]
fn templates_that_take_all_are_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let render = |source: &str| {
        std::fs::write(folder.path().join("chat_template.jinja"), source).unwrap();
        let sandbox = Sandbox::of(LATHE);
        let special = SpecialTokens::default();
        let template = ChatTemplate::load(folder.path(), &special, &sandbox);
        let start = Instant::now();
        let messages = [ChatMessage::new("user", "a\u{202e}b")];
        let outcome = template.unwrap().unwrap().render(&messages, true);
        assert!(start.elapsed() < Duration::from_secs(20), "{source}");
        outcome.map_err(|error| error.to_string())
    };
    assert_eq!(render("{{ messages[0].content }}!").unwrap(), "a\u{202e}b!");
    let error = render("{{ raise_exception('a\nb') }}").unwrap_err();
    assert!(
        error.ends_with("chat_template.jinja: chat template, line 1: a b"),
        "{error}"
    );

    let memory = "chat template: stopped at 512 MiB of memory";
    let deep = "chat template: its values or its text nest too deep";
    let time = "chat template: stopped after 5 seconds";
    for (source, expected) in [
        ("{% set n = namespace() %}{% set n.x = n %}{{ n }}", deep),
        ("{{ ([1] * 1000 * 1000 * 1000) | list }}", memory),
        ("{{ ([1] * 1000 * 1000 * 1000) | sum }}", time),
        (
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            memory,
        ),
    ] {
        let error = render(source).unwrap_err();
        assert!(error.ends_with(expected), "{source}: {error}");
    }
    // Deep nesting, some of which is folded away: a text, or one line.
    const LEN: usize = 16 << 10;
    let nested = |open: &str, close: &str, unit: &str| {
        let n = (LEN - open.len() - close.len()) / unit.len();
        format!("{open}{}{close}", unit.repeat(n))
    };
    for source in [
        "{% set n = namespace(x=[]) %}{% for a in range(999) %}{% for b in range(999) %}\
         {% set n.x = [n.x] %}{% endfor %}{% endfor %}",
        &nested("", "", "{%"),
        &nested("", "", "{{"),
        &nested("{{ ", "1 }}", "("),
        &nested("{{ ", "1 }}", "-"),
        &nested("{{ ", "1 }}", "not "),
        &nested("{{ x", " }}", ".y"),
        &nested("{{ x", " }}", "+x"),
        &nested("{{ x", " }}", "|e"),
        &nested("", "", "{%if 1%}"),
    ] {
        if let Err(error) = render(source) {
            assert!(!error.contains(char::is_control), "{error:?}");
        }
    }
}

/// Nobody else starts the renderer by accident, and nonsense on its standard input is an error.
#[test]
fn the_renderer_alone() {
    let case = Case::new();
    let error = case.fails(&format!("echo '{{' | lathe {ARGUMENT}"));
    assert!(error.contains("EOF while parsing"), "{error}");
}

/// Files that are no files, or have no end.
#[test]
fn only_regular_files_of_a_fitting_size_are_read() {
    let case = Case::new();
    let fifo = Command::new("mkfifo")
        .arg(case.at("fifo"))
        .status()
        .unwrap();
    assert!(fifo.success());
    let compile = "lathe -m m compile --target h100";
    let generate = "lathe -m m --device cpu generate -p a";
    let readers: [(&str, String); 9] = [
        ("m/config.json", compile.into()),
        ("c.yaml", format!("{compile} --config c.yaml")),
        ("s.yaml", format!("{BENCHMARK} --sampler_options s.yaml")),
        ("d.jsonl", BENCHMARK.into()),
        ("p.ir", "lathe opt p.ir".into()),
        ("m/golden.safetensors", VERIFY.into()),
        ("m/model.safetensors", BENCHMARK.into()),
        ("m/tokenizer.json", generate.into()),
        ("a.json", "lathe compare a.json a.json".into()),
    ];
    for (file, command) in &readers {
        let kept = std::fs::read(case.at(file)).ok();
        let put = |target: &Path| {
            let _ = std::fs::remove_file(case.at(file));
            std::os::unix::fs::symlink(target, case.at(file)).unwrap();
        };
        for (target, what) in [("/dev/zero", "a device"), ("/tmp", "a folder")] {
            put(Path::new(target));
            let error = case.fails(command);
            let expected = format!("{file}: is {what}, expected a regular file");
            // A folder of this name is no configuration file, but may hold one.
            if (*file, target) != ("m/config.json", "/tmp") {
                assert!(error.ends_with(&expected), "{command}: {error}");
            }
        }
        put(&case.at("fifo"));
        let error = case.fails(command);
        let expected = format!("{file}: is a FIFO, expected a regular file");
        assert!(error.ends_with(&expected), "{command}: {error}");
        // As large as a disk, without taking one.
        std::fs::remove_file(case.at(file)).unwrap();
        let sparse = std::fs::File::create(case.at(file)).unwrap();
        sparse.set_len(1 << 40).unwrap();
        let error = case.fails(command);
        let too_large = error.contains(": has 1099511627776 bytes, expected at most ");
        let weights = *file == "m/model.safetensors" && error.contains("malformed header");
        assert!(too_large || weights, "{command}: {error}");
        std::fs::remove_file(case.at(file)).unwrap();
        if let Some(kept) = kept {
            case.write(file, kept);
        }
    }
}

/// A text out of a file is neither a line of its own nor a command to the terminal.
#[test]
fn nobody_forges_a_line() {
    let case = Case::new();
    let forged = "x\nerror: all is well\u{202e}\u{1b}[2J";
    let json = serde_json::to_string(forged).unwrap();
    case.write("c.yaml", format!("{json}: 1\n{json}x: 1"));
    case.write("k.yaml", format!("model_kwargs: {{{json}: 1}}"));
    case.write("bad.jsonl", format!("{{\"task_id\": {json}}}"));
    case.write("p.ir", format!("graph \"{}", forged));
    let config = std::fs::read_to_string(case.at("m/config.json")).unwrap();
    std::fs::create_dir(case.at("n")).unwrap();
    let kind = config.replace("\"llama\"", &json);
    assert_ne!(kind, config);
    case.write("n/config.json", kind);
    for (line, code) in [
        (format!("{BENCHMARK} --config c.yaml"), 2),
        ("lathe -m m compile --target h100 --config k.yaml".into(), 0),
        (BENCHMARK.replace("d.jsonl", "bad.jsonl"), 1),
        ("lathe opt p.ir".into(), 1),
        ("lathe -m n compile --target h100".into(), 1),
        (
            format!("lathe -m $'{}' compile --target h100", "a\\nerror: zz"),
            1,
        ),
    ] {
        let output = case.shell(&line);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{line}: {error}");
        for line in error.lines() {
            assert!(
                !line.starts_with("error: all") && !line.starts_with("error: zz"),
                "{error}"
            );
        }
        let bad = |c: char| c.is_control() && c != '\n' || c == '\u{202e}';
        assert!(!error.contains(bad), "{line}: {error:?}");
    }
}

/// A file that is shortened while its weights are read.
#[test]
fn weights_that_shrink_are_an_error() {
    use lathe::model::WeightChoice;
    let case = Case::new();
    let model = crate::common::compiled(&case.at("m"), "");
    let weights = model.weights(WeightChoice::Checkpoint).unwrap();
    let path = case.at("m/model.safetensors");
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(5000).unwrap();
    let recipe = model.plan.weights.last().unwrap();
    let error = lathe_runtime::weights::pack::pack_f32(&recipe.recipe, &*weights).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("it was longer when it was opened"),
        "{error}"
    );
}

#[test]
fn reports_keep_permissions_and_links_and_leave_nothing() {
    let case = Case::new();
    case.write("r.json", "old");
    let set = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(case.at("r.json"), set).unwrap();
    std::os::unix::fs::symlink("r.json", case.at("link")).unwrap();
    let output = case.shell(&format!("{BENCHMARK} --report_json link"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(case.at("link").is_symlink());
    let found = std::fs::metadata(case.at("r.json")).unwrap();
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    let report = std::fs::read_to_string(case.at("r.json")).unwrap();
    assert!(report.contains("\"performance\""));
    // No file may have more than a block of 1 KiB.
    let error = case.fails(&format!("ulimit -f 1; {BENCHMARK} --report_json link"));
    assert_eq!(
        error,
        "link cannot be written: File too large (os error 27)"
    );
    assert_eq!(std::fs::read_to_string(case.at("r.json")).unwrap(), report);
    let names = std::fs::read_dir(case.0.path()).unwrap();
    let left = names.filter(|n| n.as_ref().unwrap().file_name().as_encoded_bytes()[0] == b'.');
    assert_eq!(left.count(), 0);
}

#[test]
fn all_errors_of_a_program_name_its_file() {
    let case = Case::new();
    case.write(
        "p.ir",
        "graph \"g\" {\n  %0 = input {name=\"a\"} : f32[2]\n  %1 = neg %0 : f32[3]\n  \
         %2 = neg %0 : f32[4]\n  return y0=%2\n}\n",
    );
    let output = case.shell("lathe opt p.ir");
    let error = text(&output.stderr);
    let lines: Vec<&str> = error.trim_start_matches("error: ").lines().collect();
    assert!(lines.len() >= 2, "{error}");
    assert!(lines.iter().all(|l| l.starts_with("p.ir:")), "{error}");
}

/// Few threads and little address space: a run, or one line.
#[test]
fn limits_of_the_system() {
    let case = Case::new();
    // Root has no limit of processes; the limit of somebody else takes a shell that becomes them.
    case.shell("chmod -R a+rX .");
    let as_nobody = |line: &str| {
        case.shell(&format!(
            "export LATHE={LATHE}; setpriv --reuid=65534 --clear-groups bash -c '{line}'"
        ))
    };
    if as_nobody("true").status.success() && as_nobody("test -x $LATHE").status.success() {
        for n in [1, 2, 5] {
            let output = as_nobody(&format!(
                "ulimit -u {n}; exec $LATHE -m m --device cpu throughput --dataset d.jsonl"
            ));
            let error = text(&output.stderr);
            assert!(!error.contains("panicked"), "{n}: {error}");
            assert!(error.lines().count() <= 1, "{n}: {error}");
        }
    }
    for mib in [200, 400, 800] {
        let kib = mib << 10;
        let output = case.shell(&format!("ulimit -v {kib}; {VERIFY}"));
        let error = text(&output.stderr);
        assert!(!error.contains("panicked"), "{mib} MiB: {error}");
        assert!(output.status.success(), "{mib} MiB: {error}");
    }
}
