//! A connection of a server, and its answers that are not read yet. HTTP/2 lets a peer keep its
//! window shut: what waits for it takes memory, so it has a time. The rest of an answer that does
//! not move for so long is thrown away, and a connection with many of these is closed; one slow
//! reader behind a gateway loses its answer, not the others' connection. A peer with an open window
//! that does not read its socket is left to the socket's write time-out; what HTTP/2 keeps for it
//! meanwhile takes room like any answer.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::HeaderMap;
use hyper::body::{Body, Bytes, Frame};
use tokio::{sync::Notify, time::Instant};
use tokio_util::{sync::CancellationToken, task::task_tracker::TaskTrackerToken};

use crate::{
    admission::{Admission, Part, Seat, Share},
    config::Limits,
    tasks,
};

/// Answers without a reader that end a connection.
const STALLED: usize = 8;
/// As much as one frame of HTTP/2 carries.
const PIECE: usize = 16 * 1024;
/// A shorter message goes whole. In a longer one the last byte goes by itself: its stream takes it
/// only when all that precedes it has left, and so it shows when the rest has. What has gone whole
/// may stay as long as the peer likes, once for each stream.
const SHORT: usize = 128;

/// What is known of a connection while it, or an answer on it, lives.
pub(crate) struct Line {
    share: Arc<Share>,
    seat: Seat,
    unsent: Mutex<Vec<Weak<Unsent>>>,
    added: Arc<Notify>,
    /// Cancelled when the connection has ended, or is to end.
    end: CancellationToken,
    began: Instant,
    /// Milliseconds after `began` at which the peer was last heard.
    heard: AtomicU64,
    /// Bytes that were read from it.
    read: AtomicU64,
    /// Bytes that its socket has taken.
    written: AtomicU64,
    /// Whether its socket takes no more at the moment.
    blocked: AtomicBool,
    /// Whether TLS has bytes that its socket has not taken.
    unflushed: AtomicBool,
    /// Answers that HTTP/2 has whole, and its socket perhaps not, in the order in which they were
    /// handed over.
    leaving: Mutex<VecDeque<Leaving>>,
}

struct Leaving {
    _room: Part,
    /// How much the socket has taken when this answer has left, if nothing else was written.
    due: u64,
    since: Instant,
}

impl Line {
    /// A connection's, whose peer has shown a certificate of that name, or none. A peer of which
    /// fewer bytes than `first_word` are read within `idle_timeout` is left.
    pub(crate) fn new(
        admission: &Admission,
        seat: Seat,
        name: Option<&str>,
        limits: &Limits,
        first_word: u64,
    ) -> Arc<Line> {
        let line = Arc::new(Line {
            share: admission.share(name),
            seat,
            unsent: Mutex::default(),
            added: Arc::default(),
            end: CancellationToken::new(),
            began: Instant::now(),
            heard: AtomicU64::new(0),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            blocked: AtomicBool::new(false),
            unflushed: AtomicBool::new(false),
            leaving: Mutex::default(),
        });
        let watch = watch(
            Arc::downgrade(&line),
            line.added.clone(),
            line.end.clone(),
            (limits.write_timeout, limits.idle_timeout),
        );
        tasks::spawn(watch);
        let silent = expect_a_word(
            Arc::downgrade(&line),
            line.end.clone(),
            limits.idle_timeout,
            first_word,
        );
        tasks::spawn(silent);
        line
    }

    pub(crate) fn share(&self) -> &Arc<Share> {
        &self.share
    }

    /// Whether it is one too many: its calls are refused.
    pub(crate) fn is_over(&self) -> bool {
        self.seat.over
    }

    /// So many bytes were read from it.
    pub(crate) fn heard(&self, bytes: usize) {
        let now = self.began.elapsed().as_millis() as u64;
        self.heard.store(now, Ordering::Relaxed);
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Its socket took so many bytes, or `None` at the moment.
    pub(crate) fn wrote(&self, bytes: Option<usize>) {
        self.blocked.store(bytes.is_none(), Ordering::Relaxed);
        let Some(bytes) = bytes else { return };
        let bytes = bytes as u64;
        let written = self.written.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let mut leaving = locked(&self.leaving);
        while leaving.front().is_some_and(|front| front.due <= written) {
            leaving.pop_front();
        }
    }

    /// Whether all that was written is the kernel's.
    pub(crate) fn flushed(&self, done: bool) {
        self.unflushed.store(!done, Ordering::Relaxed);
    }

    /// HTTP/2 has all of what this room is for.
    pub(crate) fn leave(&self, room: Part) {
        let mut leaving = locked(&self.leaving);
        let before = leaving.back().map_or(0, |last| last.due);
        let before = before.max(self.written.load(Ordering::Relaxed));
        leaving.push_back(Leaving {
            due: before + room.count() as u64,
            _room: room,
            since: Instant::now(),
        });
    }

    /// Forgets what has left by now: a socket that takes more has all that was handed over a while
    /// ago. Whether something is still leaving.
    fn forget_what_has_left(&self, a_while: Duration) -> bool {
        let mut leaving = locked(&self.leaving);
        let blocked = self.blocked.load(Ordering::Relaxed);
        if !blocked && !self.unflushed.load(Ordering::Relaxed) {
            leaving.retain(|answer| answer.since.elapsed() < a_while);
        }
        !leaving.is_empty()
    }

    pub(crate) fn end(&self) -> &CancellationToken {
        &self.end
    }

    fn add(&self, unsent: &Arc<Unsent>) {
        locked(&self.unsent).push(Arc::downgrade(unsent));
        self.added.notify_one();
    }

    /// Throws away what has not moved for `write_timeout`. Whether anything is still waiting.
    fn sweep(&self, write_timeout: Duration, idle_timeout: Duration) -> bool {
        let mut stalled = 0;
        let mut unsent = locked(&self.unsent);
        unsent.retain(|unsent| {
            let Some(unsent) = unsent.upgrade() else {
                return false;
            };
            // it lives until its last byte has left its stream
            let mut rest = locked(&unsent.0);
            if rest.moved.elapsed() >= write_timeout {
                rest.throw_away();
            }
            stalled += usize::from(rest.thrown_away);
            true
        });
        let heard = Duration::from_millis(self.heard.load(Ordering::Relaxed));
        let silent = self.began.elapsed().saturating_sub(heard);
        if stalled >= STALLED || (stalled > 0 && silent >= idle_timeout) {
            tracing::debug!(
                answers = stalled,
                "connection closed, its answers are not read"
            );
            self.end.cancel();
        }
        !unsent.is_empty()
    }
}

/// Ends a connection of which fewer than `first_word` bytes were read in its first `bound`.
async fn expect_a_word(line: Weak<Line>, end: CancellationToken, bound: Duration, first_word: u64) {
    tokio::select! {
        () = end.cancelled() => {}
        () = tokio::time::sleep(bound) => {
            let read = line.upgrade().map(|line| line.read.load(Ordering::Relaxed));
            if read.is_some_and(|read| read < first_word) {
                end.cancel();
            }
        }
    }
}

/// Looks after a connection's answers while there are some.
async fn watch(
    line: Weak<Line>,
    added: Arc<Notify>,
    end: CancellationToken,
    (write_timeout, idle_timeout): (Duration, Duration),
) {
    let tick = (write_timeout / 4).clamp(Duration::from_millis(10), Duration::from_millis(100));
    let watched = async {
        loop {
            added.notified().await;
            loop {
                tokio::time::sleep(tick).await;
                let Some(line) = line.upgrade() else { return };
                let unsent = line.sweep(write_timeout, idle_timeout);
                let leaving = line.forget_what_has_left(tick);
                if !unsent && !leaving {
                    break;
                }
            }
        }
    };
    tokio::select! {
        () = end.cancelled() => {}
        () = watched => {}
    }
}

/// What of an answer has not been handed over.
struct Unsent(Mutex<Rest>);

struct Rest {
    data: Bytes,
    /// Its room, until HTTP/2 has all of it.
    room: Option<Part>,
    /// What a stop waits for.
    token: Option<TaskTrackerToken>,
    moved: Instant,
    begun: bool,
    thrown_away: bool,
}

/// The body of a gRPC answer, a long message of it in pieces. hyper takes a piece and waits until
/// its stream may send a byte at least; it would take a whole message likewise, and end the body
/// while its reader has room for little of it.
pub(crate) struct Answer {
    unsent: Arc<Unsent>,
    trailers: Option<HeaderMap>,
    line: Option<Arc<Line>>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        let room = locked(&self.unsent.0).room.take();
        if let (Some(line), Some(mut room)) = (&self.line, room) {
            // of a longer message one byte
            room.shrink(SHORT);
            line.leave(room);
        }
    }
}

impl Answer {
    pub(crate) fn new(
        data: Bytes,
        trailers: Option<HeaderMap>,
        room: Part,
        token: TaskTrackerToken,
        line: Option<Arc<Line>>,
    ) -> Answer {
        let rest = Rest {
            data,
            room: Some(room),
            token: Some(token),
            moved: Instant::now(),
            begun: false,
            thrown_away: false,
        };
        let unsent = Arc::new(Unsent(Mutex::new(rest)));
        if let Some(line) = &line {
            line.add(&unsent);
        }
        Answer {
            unsent,
            trailers,
            line,
        }
    }
}

impl Rest {
    /// The piece that its stream has taken may stay as long as the connection.
    fn throw_away(&mut self) {
        self.data = Bytes::new();
        self.token = None;
        if let Some(room) = &mut self.room {
            room.shrink(PIECE);
        }
        self.thrown_away = true;
    }

    fn piece(&mut self) -> Bytes {
        let length = match self.data.len() {
            whole if whole <= SHORT && !self.begun => return std::mem::take(&mut self.data),
            1 => 1,
            rest => PIECE.min(rest - 1),
        };
        // the last byte of what is sent in pieces is waited for
        self.begun = true;
        let piece = self.data.split_to(length);
        // HTTP/2 may keep it after the rest has gone: a slice would keep the whole in memory
        Bytes::copy_from_slice(&piece)
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let data = {
            let mut rest = locked(&self.unsent.0);
            if rest.thrown_away {
                return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
            }
            rest.moved = Instant::now();
            (!rest.data.is_empty()).then(|| rest.piece())
        };
        let frame = match data {
            Some(data) => Some(Frame::data(data)),
            None => self.trailers.take().map(Frame::trailers),
        };
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        let rest = locked(&self.unsent.0);
        rest.data.is_empty() && !rest.thrown_away && self.trailers.is_none()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
