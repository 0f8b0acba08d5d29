//! Writes lines to a stream that may not be read. A pipe that nobody reads blocks its writer: lines
//! wait in bounded queues for a thread of their own, and what finds no room is lost and counted.

use std::{
    collections::VecDeque,
    fs::File,
    io::Write as _,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prometheus::{IntCounterVec, Opts};
use tracing::Level;

use crate::grpc::registered;

/// Lines and bytes that may wait. ERROR and WARN have a queue of their own, so that a flood of the
/// others hides none of them.
const IMPORTANT: Room = Room {
    lines: 1_024,
    bytes: 1 << 20,
};
const OTHERS: Room = Room {
    lines: 8_192,
    bytes: 7 << 20,
};
/// How long a process that ends waits for its last lines.
const FLUSH_BOUND: Duration = Duration::from_millis(500);

/// The log.
pub(crate) static STDOUT: LazyLock<Writer> = LazyLock::new(|| Writer::of(&std::io::stdout()));
/// What has to be seen where the log is not read: a panic, why a process ends.
pub(crate) static STDERR: LazyLock<Writer> = LazyLock::new(|| Writer::of(&std::io::stderr()));

#[derive(Clone, Copy)]
struct Room {
    lines: usize,
    bytes: usize,
}

/// Waits until everything is written, for as long as a process that ends may.
pub(crate) fn flush() {
    let by = Instant::now() + FLUSH_BOUND;
    for writer in [&STDOUT, &STDERR] {
        writer.flush(by.saturating_duration_since(Instant::now()));
    }
}

/// A stream and what waits for it.
pub(crate) struct Writer(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    lost: Mutex<Option<IntCounterVec>>,
}

#[derive(Default)]
struct State {
    important: Queue,
    others: Queue,
    /// Of the next line; lines leave in the order in which they came.
    number: u64,
    writing: bool,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<(u64, Vec<u8>)>,
    bytes: usize,
}

impl Queue {
    fn push(&mut self, number: u64, line: Vec<u8>, room: Room) -> bool {
        let fits = self.lines.len() < room.lines && self.bytes + line.len() <= room.bytes;
        if fits {
            self.bytes += line.len();
            self.lines.push_back((number, line));
        }
        fits
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        let (_, line) = self.lines.pop_front()?;
        self.bytes -= line.len();
        Some(line)
    }

    fn next(&self) -> Option<u64> {
        self.lines.front().map(|(number, _)| *number)
    }
}

impl State {
    fn next(&mut self) -> Option<Vec<u8>> {
        match (self.important.next(), self.others.next()) {
            (Some(one), Some(other)) if other < one => self.others.pop(),
            (None, _) => self.others.pop(),
            _ => self.important.pop(),
        }
    }
}

impl Writer {
    /// Over a descriptor of its own: the lock of [`std::io::Stdout`] would be held for as long as
    /// the pipe is full.
    fn of(stream: &impl AsFd) -> Writer {
        match stream.as_fd().try_clone_to_owned() {
            Ok(stream) => Writer::start(stream),
            // there is no such stream: lines are lost when the queue is full
            Err(_) => Writer(Shared::new()),
        }
    }

    fn start(stream: OwnedFd) -> Writer {
        let (shared, mut stream) = (Shared::new(), File::from(stream));
        let writing = shared.clone();
        std::thread::spawn(move || {
            loop {
                let line = writing.next();
                // a reader that has gone is no reason to stop
                stream.write_all(&line).ok();
            }
        });
        Writer(shared)
    }

    /// Counts lost lines as `<service>_log_lost_total`.
    pub(crate) fn count_lost(&self, service: &str) {
        let lost = Opts::new(
            format!("{service}_log_lost_total"),
            "Log lines that were not written because the stream was not read, by level.",
        );
        let lost: IntCounterVec = registered(IntCounterVec::new(lost, &["level"]));
        for level in ["error", "warn", "info", "debug", "trace"] {
            lost.with_label_values(&[level]);
        }
        *locked(&self.0.lost) = Some(lost);
    }

    /// Never waits.
    pub(crate) fn write(&self, level: Level, mut line: String) {
        line.push('\n');
        let mut state = locked(&self.0.state);
        let number = state.number;
        state.number += 1;
        let kept = if level <= Level::WARN {
            state.important.push(number, line.into(), IMPORTANT)
        } else {
            state.others.push(number, line.into(), OTHERS)
        };
        drop(state);
        if kept {
            self.0.changed.notify_all();
        } else if let Some(lost) = &*locked(&self.0.lost) {
            let level = level.as_str().to_ascii_lowercase();
            lost.with_label_values(&[level.as_str()]).inc();
        }
    }

    fn flush(&self, bound: Duration) {
        let state = locked(&self.0.state);
        let waiting = |state: &mut State| {
            state.writing || state.important.next().or(state.others.next()).is_some()
        };
        let waited = self.0.changed.wait_timeout_while(state, bound, waiting);
        drop(waited);
    }
}

impl Shared {
    fn new() -> Arc<Shared> {
        Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            lost: Mutex::default(),
        })
    }

    /// The next line, when there is one. The one before has been written.
    fn next(&self) -> Vec<u8> {
        let mut state = locked(&self.state);
        loop {
            if let Some(line) = state.next() {
                state.writing = true;
                return line;
            }
            if std::mem::take(&mut state.writing) {
                self.changed.notify_all();
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, pipe};

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_holds_nobody_and_its_losses_are_counted() {
        let (reader, full) = pipe().unwrap();
        let writer = Writer::start(full.into());
        writer.count_lost("unread");
        let line = "x".repeat(1_000);
        for _ in 0..10_000 {
            writer.write(Level::INFO, line.clone());
        }
        for number in 0..2_000 {
            writer.write(Level::ERROR, format!("error {number} {line}"));
        }
        let lost = |level: &str| {
            let lost = locked(&writer.0.lost);
            lost.as_ref().unwrap().with_label_values(&[level]).get()
        };
        // what is in the pipe, and the line that waits for it
        let in_pipe = 64 + 1;
        let expected = 10_000 - (OTHERS.bytes / 1_001) as u64;
        assert!(lost("info") <= expected && lost("info") >= expected - in_pipe);
        assert!(
            lost("error") >= 900 && lost("error") < 1_000,
            "{}",
            lost("error")
        );
        writer.flush(FLUSH_BOUND);

        // read at last, the lines are whole and in their order
        let mut errors = 0;
        for line in BufReader::new(reader).lines() {
            let line = line.unwrap();
            if line.starts_with("error ") {
                assert!(line.starts_with(&format!("error {errors} ")), "{line}");
                errors += 1;
                if errors == 2_000 - lost("error") {
                    break;
                }
            } else {
                assert_eq!((line.len(), errors), (1_000, 0));
            }
        }
        writer.flush(FLUSH_BOUND);
        assert!(!locked(&writer.0.state).writing);
    }
}
