//! What a process takes on at once: connections, calls that are worked on, bytes of requests and
//! answers. What is over a bound is refused at once, nothing queues; and one peer may hold only a
//! part, so that others find room beside it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::{
    config::Limits,
    error::{Code, Detail, Fault},
    peer::PeerId,
};

/// After a refusal for want of a place, no peer may hold more than half of the places for so long.
const CROWDED: Duration = Duration::from_secs(1);
/// While several peers hold places or bytes, the last one in so many is for those that hold few:
/// one in so many of what is free, so that the more there are, the less each has.
const RESERVE: usize = 8;
/// Connections over the limit that are told so; beyond these a connection is closed without a word.
const TOLD: usize = 64;

/// A handle; clones share the bounds.
#[derive(Clone)]
pub(crate) struct Admission(Arc<Inner>);

/// Places, or bytes.
struct Stock {
    free: Arc<Semaphore>,
    most: usize,
}

impl Stock {
    fn new(most: usize) -> Stock {
        Stock {
            free: Arc::new(Semaphore::new(most)),
            most,
        }
    }

    /// Whether what is left is for peers that hold less than one who holds `held` and wants `count`
    /// more: several peers, each within its part, would leave nothing for the next one.
    fn is_reserved(&self, held: usize, count: usize) -> bool {
        let free = self.free.available_permits();
        let of_others = self.most.saturating_sub(free + held);
        let few = (free / RESERVE).max(1);
        held + count > few && of_others > 0 && free < self.most / RESERVE + count
    }
}

struct Inner {
    places: Stock,
    bytes: Stock,
    connections: Arc<Semaphore>,
    told: Arc<Semaphore>,
    /// When a peer with few places was refused one.
    refused: Mutex<Option<Instant>>,
    /// Shares of peers with a certificate, by its name.
    named: Mutex<HashMap<String, Weak<Share>>>,
}

/// Which bound a refusal is about: the `reason` of its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bound {
    Calls,
    Bytes,
    Connections,
}

impl From<Bound> for Fault {
    fn from(bound: Bound) -> Fault {
        let (reason, message) = match bound {
            Bound::Calls => ("CALLS", "too many calls in progress, try again later"),
            Bound::Bytes => ("BYTES", "too many bytes in progress, try again later"),
            Bound::Connections => ("CONNECTIONS", "too many connections, try again later"),
        };
        Fault {
            code: Code::ResourceExhausted,
            message: message.to_owned(),
            detail: Detail::Reason {
                reason,
                metadata: Vec::new(),
            },
        }
    }
}

/// What one peer holds: the connections of one certificate, or one connection without.
#[derive(Debug)]
pub(crate) struct Share {
    pub(crate) peer: PeerId,
    places: AtomicUsize,
    bytes: AtomicUsize,
}

impl Default for Share {
    fn default() -> Share {
        Share {
            peer: PeerId::unused(),
            places: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
        }
    }
}

/// A part of a bound, until it is dropped.
pub(crate) struct Part {
    permit: OwnedSemaphorePermit,
    share: Arc<Share>,
    count: usize,
    of: fn(&Share) -> &AtomicUsize,
}

impl Part {
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Gives back what is over `most`.
    pub(crate) fn shrink(&mut self, most: usize) {
        let over = self.count.saturating_sub(most);
        let permits = self.permit.num_permits().saturating_sub(most);
        drop(self.permit.split(permits));
        (self.of)(&self.share).fetch_sub(over, Ordering::Relaxed);
        self.count -= over;
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        (self.of)(&self.share).fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// A connection's place among the connections.
pub(crate) struct Seat {
    _permit: OwnedSemaphorePermit,
    /// Whether it is over the limit, and only there to be told so.
    pub(crate) over: bool,
}

impl Admission {
    pub(crate) fn new(limits: &Limits) -> Admission {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Admission(Arc::new(Inner {
            places: Stock::new(limits.in_flight),
            bytes: Stock::new(limits.memory),
            connections: semaphore(limits.connections),
            told: semaphore(TOLD),
            refused: Mutex::default(),
            named: Mutex::default(),
        }))
    }

    /// A seat for a new connection. `None`: it is closed at once.
    pub(crate) fn seat(&self) -> Option<Seat> {
        let seat = |from: &Arc<Semaphore>, over| {
            let permit = from.clone().try_acquire_owned().ok()?;
            let _permit = permit;
            Some(Seat { _permit, over })
        };
        seat(&self.0.connections, false).or_else(|| seat(&self.0.told, true))
    }

    /// The share of a peer by the name of its certificate; without one, of a connection alone.
    pub(crate) fn share(&self, name: Option<&str>) -> Arc<Share> {
        let Some(name) = name else {
            return Arc::default();
        };
        let mut named = locked(&self.0.named);
        if let Some(share) = named.get(name).and_then(Weak::upgrade) {
            return share;
        }
        named.retain(|_, share| share.strong_count() > 0);
        let share = Arc::default();
        named.insert(name.to_owned(), Arc::downgrade(&share));
        share
    }

    /// A place for a call to be worked on.
    ///
    /// # Errors
    /// Every place is taken, or the peer has half of them while others find none.
    pub(crate) fn place(&self, share: &Arc<Share>) -> Result<Part, Bound> {
        let inner = &self.0;
        let half = inner.places.most.div_ceil(2);
        let held = share.places.load(Ordering::Relaxed);
        let crowded = || locked(&inner.refused).is_some_and(|at| at.elapsed() < CROWDED);
        if held >= half && crowded() {
            return Err(Bound::Calls);
        }
        let permit = if inner.places.is_reserved(held, 1) {
            None
        } else {
            inner.places.free.clone().try_acquire_owned().ok()
        };
        let Some(permit) = permit else {
            if held < half {
                *locked(&inner.refused) = Some(Instant::now());
            }
            return Err(Bound::Calls);
        };
        Ok(part(permit, share, 1, |share| &share.places))
    }

    /// Room for `count` bytes of a request or an answer.
    ///
    /// # Errors
    /// There is none, or the peer has a quarter of it already.
    pub(crate) fn bytes(&self, share: &Arc<Share>, count: usize) -> Result<Part, Bound> {
        let inner = &self.0;
        let held = share.bytes.load(Ordering::Relaxed);
        // one message of a peer alone fits always, whatever the limits are
        let most = inner.bytes.most;
        if held > 0 && held + count > most / 4 || inner.bytes.is_reserved(held, count) {
            return Err(Bound::Bytes);
        }
        let wanted = u32::try_from(count.min(most)).map_err(|_| Bound::Bytes)?;
        let permit = inner.bytes.free.clone().try_acquire_many_owned(wanted);
        let permit = permit.map_err(|_| Bound::Bytes)?;
        Ok(part(permit, share, count, |share| &share.bytes))
    }
}

#[cfg(test)]
impl Admission {
    pub(crate) fn free_bytes(&self) -> usize {
        self.0.bytes.free.available_permits()
    }
}

fn part(
    permit: OwnedSemaphorePermit,
    share: &Arc<Share>,
    count: usize,
    of: fn(&Share) -> &AtomicUsize,
) -> Part {
    of(share).fetch_add(count, Ordering::Relaxed);
    Part {
        permit,
        share: share.clone(),
        count,
        of,
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
