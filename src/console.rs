//! Progress on stderr: a bar for each long task and, when it ends, one line with its time. Nothing is
//! drawn without a terminal, with JSON logs, or below the log level `info`.

use crate::errors::printable;
use crate::phases::{PHASE, duration};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use lathe_runtime::progress::{Observer, Unit, observe};
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

const SPINNER: &str = "{spinner} {prefix:<16} {elapsed}";
const BYTES: &str = "{spinner} {prefix:<16} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}";
const ITEMS: &str = "{spinner} {prefix:<16} {wide_bar} {pos} of {len}, {eta} left";

/// A terminal with the bars of what runs.
#[derive(Debug)]
struct Console {
    bars: MultiProgress,
    running: Mutex<Vec<Running>>,
}

#[derive(Clone, Debug)]
struct Running {
    name: &'static str,
    bar: ProgressBar,
    /// Whether a [`Task`] ends it; else it ends when it is complete.
    task: bool,
}

static CONSOLE: OnceLock<Console> = OnceLock::new();

/// Shows progress if `wanted` and stderr is a terminal. To be called once, before any task.
pub fn init(wanted: bool) {
    if wanted && std::io::stderr().is_terminal() {
        CONSOLE.get_or_init(|| Console::new(ProgressDrawTarget::stderr()));
        observe(Box::new(Watch));
    }
}

/// Shows what the runtime tells.
struct Watch;

impl Observer for Watch {
    fn advance(&self, task: &'static str, unit: Unit, done: u64, total: u64) {
        if let Some(console) = CONSOLE.get() {
            console.advance(task, unit, done, total);
        }
    }

    fn end(&self, task: &'static str) {
        if let Some(console) = CONSOLE.get() {
            console.end(task);
        }
    }
}

/// Writes a line to stderr, above the bars.
pub fn say(line: &str) {
    put(format!("{}\n", printable(line)).as_bytes());
}

/// Writes to stderr, above the bars. A reader that went away or a full disk is no reason to stop: what is computed and
/// what goes to stdout and into files does not depend on it.
fn put(bytes: &[u8]) {
    let write = || {
        let _ = std::io::stderr().lock().write_all(bytes);
    };
    CONSOLE.get().map_or_else(write, |c| c.bars.suspend(write));
}

/// Writes log lines to stderr above the bars.
#[derive(Clone, Copy, Debug)]
pub struct LogWriter {
    /// Lines are text for a person: what a file put into one stays on its line. JSON escapes by itself.
    pub text: bool,
}

impl Write for LogWriter {
    /// Takes a whole event, which is how `tracing_subscriber` hands them over.
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        match std::str::from_utf8(event) {
            Ok(line) if self.text => say(line.strip_suffix('\n').unwrap_or(line)),
            _ => put(event),
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Console {
    fn new(target: ProgressDrawTarget) -> Console {
        Console {
            bars: MultiProgress::with_draw_target(target),
            running: Mutex::default(),
        }
    }

    fn running(&self) -> MutexGuard<'_, Vec<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, name: &'static str, task: bool) -> Running {
        let bar = self.bars.add(ProgressBar::no_length());
        bar.set_style(style(SPINNER));
        bar.set_prefix(name);
        bar.enable_steady_tick(Duration::from_millis(100));
        let running = Running { name, bar, task };
        self.running().push(running.clone());
        running
    }

    /// Moves the bar of a task. One that no [`Task`] stands for gets a bar until it is complete.
    fn advance(&self, name: &'static str, unit: Unit, done: u64, total: u64) {
        let known = self.running().iter().find(|r| r.name == name).cloned();
        let Running { bar, task, .. } = known.unwrap_or_else(|| self.begin(name, false));
        if bar.length() != Some(total) {
            // Begun, or begun again: a step of a longer task that is done in several rounds.
            bar.set_position(0);
            bar.set_length(total);
            bar.set_style(style(match unit {
                Unit::Bytes => BYTES,
                Unit::Items => ITEMS,
            }));
        }
        // Threads report out of order.
        bar.set_position(done.max(bar.position()));
        if done >= total && !task {
            self.remove(&bar);
        }
    }

    /// Ends a task that no [`Task`] stands for.
    fn end(&self, name: &'static str) {
        let known = self.running().iter().find(|r| r.name == name).cloned();
        if let Some(Running {
            bar, task: false, ..
        }) = known
        {
            self.remove(&bar);
        }
    }

    fn remove(&self, bar: &ProgressBar) {
        bar.finish_and_clear();
        self.bars.remove(bar);
        self.running().retain(|r| !r.bar.is_finished());
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants, and a test uses each.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A long task: its bar is drawn until it ends or is dropped.
#[derive(Debug)]
pub struct Task {
    name: &'static str,
    start: Instant,
    console: Option<&'static Console>,
    bar: Option<ProgressBar>,
}

impl Task {
    /// Begins a task.
    pub fn begin(name: &'static str) -> Task {
        Task::on(CONSOLE.get(), name)
    }

    fn on(console: Option<&'static Console>, name: &'static str) -> Task {
        Task {
            name,
            start: Instant::now(),
            console,
            bar: console.map(|c| c.begin(name, true).bar),
        }
    }

    /// `done` of `total` items are done.
    pub fn advance(&self, done: usize, total: usize) {
        if let Some(console) = self.console {
            console.advance(self.name, Unit::Items, done as u64, total as u64);
        }
    }

    /// Ends the task: one line with its time and `detail` on a terminal, an event `phase` in JSON logs.
    pub fn end(mut self, detail: &str) -> Duration {
        let time = self.start.elapsed();
        self.clear();
        tracing::info!(target: PHASE, phase = self.name, seconds = time.as_secs_f64(), detail, "phase");
        if let Some(console) = self.console {
            let line = format!("{:<16} {:>9}  {detail}", self.name, duration(time));
            // A terminal that went away is no reason to stop.
            let _ = console.bars.println(line.trim_end());
        }
        time
    }

    fn clear(&mut self) {
        if let (Some(console), Some(bar)) = (self.console, self.bar.take()) {
            console.remove(&bar);
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use indicatif::TermLike;
    use std::sync::Arc;

    /// Records what is written, without its control sequences.
    #[derive(Debug, Default, Clone)]
    struct Paper(Arc<Mutex<String>>);

    impl TermLike for Paper {
        fn width(&self) -> u16 {
            100
        }
        fn move_cursor_up(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn write_line(&self, s: &str) -> std::io::Result<()> {
            self.write_str(&format!("{s}\n"))
        }
        fn write_str(&self, s: &str) -> std::io::Result<()> {
            self.0.lock().unwrap().push_str(s);
            Ok(())
        }
        fn clear_line(&self) -> std::io::Result<()> {
            self.write_str("\n")
        }
        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn on_paper() -> (&'static Console, Paper) {
        let paper = Paper::default();
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(paper.clone()), 250);
        (Box::leak(Box::new(Console::new(target))), paper)
    }

    #[test]
    fn bars_while_a_task_runs_and_one_line_at_its_end() {
        let (console, paper) = on_paper();
        let task = Task::on(Some(console), "load weights");
        console.advance("load weights", Unit::Bytes, 1 << 20, 4 << 20);
        console.advance("load weights", Unit::Bytes, 4 << 20, 4 << 20);
        console.advance("load weights", Unit::Bytes, 3 << 20, 4 << 20);
        let bar = task.bar.clone().unwrap();
        bar.force_draw();
        assert_eq!(bar.position(), 4 << 20, "threads report out of order");
        assert!(!bar.is_finished(), "the task ends it");
        task.end("4.00 MiB");
        let text = paper.0.lock().unwrap().clone();
        assert!(text.contains("4.00 MiB of 4.00 MiB"), "{text}");
        let last = text.lines().map(str::trim).rfind(|l| !l.is_empty());
        let last = last.unwrap();
        assert!(
            last.starts_with("load weights ") && last.ends_with("s  4.00 MiB"),
            "{last:?} of {text}"
        );
        assert!(console.running().is_empty());
    }

    #[test]
    fn what_the_runtime_does_by_itself_has_a_bar_until_it_is_done() {
        let (console, paper) = on_paper();
        let outer = Task::on(Some(console), "benchmark");
        outer.advance(1, 10);
        console.advance("compile kernels", Unit::Items, 1, 3);
        let bar = console.running()[1].bar.clone();
        bar.force_draw();
        assert!(paper.0.lock().unwrap().contains("1 of 3"));
        console.advance("compile kernels", Unit::Items, 3, 3);
        assert!(bar.is_finished());
        let names: Vec<&str> = console.running().iter().map(|r| r.name).collect();
        assert_eq!(names, ["benchmark"]);
        console.advance("compile kernels", Unit::Items, 1, 1);
        drop(outer);
        assert!(console.running().is_empty());
    }

    #[test]
    fn a_task_in_rounds_and_another_within_it() {
        let (console, paper) = on_paper();
        let outer = Task::on(Some(console), "compile kernels");
        console.advance("compile kernels", Unit::Items, 40, 40);
        console.advance("autotune", Unit::Items, 0, 12);
        console.advance("compile kernels", Unit::Items, 7, 300);
        assert_eq!(outer.bar.as_ref().unwrap().position(), 7, "a new round");
        console.advance("autotune", Unit::Items, 5, 12);
        console.running()[1].bar.force_draw();
        assert!(paper.0.lock().unwrap().contains("5 of 12"));
        console.end("autotune");
        console.end("compile kernels");
        let names: Vec<&str> = console.running().iter().map(|r| r.name).collect();
        assert_eq!(names, ["compile kernels"], "its task ends it");
        drop(outer);
        assert!(console.running().is_empty());
    }

    #[test]
    fn templates_are_valid() {
        for template in [SPINNER, BYTES, ITEMS] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
