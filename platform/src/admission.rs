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
/// While several peers hold places or bytes, the last one in so many is for those that hold few.
const RESERVE: usize = 8;
/// A peer with less than one in so many holds few.
const SMALL: usize = 64;
/// Connections over the limit that are told so; beyond these a connection is closed without a word.
const TOLD: usize = 64;

/// A handle; clones share the bounds.
#[derive(Clone)]
pub(crate) struct Admission(Arc<Inner>);

struct Inner {
    places: Arc<Semaphore>,
    most_places: usize,
    bytes: Arc<Semaphore>,
    most_bytes: usize,
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
        drop(
            self.permit
                .split(self.permit.num_permits().saturating_sub(most)),
        );
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
            places: semaphore(limits.in_flight),
            most_places: limits.in_flight,
            bytes: semaphore(limits.memory),
            most_bytes: limits.memory,
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
        let half = inner.most_places.div_ceil(2);
        let held = share.places.load(Ordering::Relaxed);
        let crowded = || locked(&inner.refused).is_some_and(|at| at.elapsed() < CROWDED);
        if held >= half && crowded() {
            return Err(Bound::Calls);
        }
        let free = inner.places.available_permits();
        let permit = if is_reserved(inner.most_places, free, held, 1) {
            None
        } else {
            inner.places.clone().try_acquire_owned().ok()
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
        // one message fits always, whatever the limits are
        if held > 0 && held + count > inner.most_bytes / 4 {
            return Err(Bound::Bytes);
        }
        let free = inner.bytes.available_permits();
        if is_reserved(inner.most_bytes, free, held, count) {
            return Err(Bound::Bytes);
        }
        let wanted = u32::try_from(count.min(inner.most_bytes)).map_err(|_| Bound::Bytes)?;
        let permit = inner.bytes.clone().try_acquire_many_owned(wanted);
        let permit = permit.map_err(|_| Bound::Bytes)?;
        Ok(part(permit, share, count, |share| &share.bytes))
    }
}

#[cfg(test)]
impl Admission {
    pub(crate) fn free_bytes(&self) -> usize {
        self.0.bytes.available_permits()
    }
}

/// Whether what is left of `most` is for peers that hold less than one who holds `held` and wants
/// `count` more: several peers, each within its part, would leave nothing for the next one.
fn is_reserved(most: usize, free: usize, held: usize, count: usize) -> bool {
    let of_others = most.saturating_sub(free + held);
    let is_small = held + count <= most.div_ceil(SMALL);
    !is_small && of_others > 0 && free < most / RESERVE + count
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
mod tests {
    use super::*;

    fn admission() -> Admission {
        Admission::new(&Limits {
            in_flight: 4,
            memory: 4_000,
            connections: 2,
            ..Limits::default()
        })
    }

    #[tokio::test]
    async fn a_peer_has_all_places_until_another_finds_none() {
        let (admission, one, other) = (admission(), Arc::default(), Arc::default());
        let mut places: Vec<_> = (0..4)
            .map(|_| admission.place(&one).ok().unwrap())
            .collect();
        assert!(admission.place(&one).is_err());
        // its own refusal says nothing of others: it gets back what it lets go
        places.pop();
        places.push(admission.place(&one).ok().unwrap());
        assert_eq!(admission.place(&other).err(), Some(Bound::Calls));
        places.pop();
        assert!(
            admission.place(&one).is_err(),
            "more than half, and another was refused"
        );
        let _others = admission.place(&other).ok().unwrap();
        places.truncate(1);
        places.push(admission.place(&one).ok().unwrap());
        assert!(admission.place(&one).is_err());
        *locked(&admission.0.refused) = Instant::now().checked_sub(CROWDED);
        assert!(admission.place(&one).is_ok());
    }

    #[tokio::test]
    async fn many_busy_peers_leave_places_for_one_that_asks_for_few() {
        let admission = Admission::new(&Limits {
            in_flight: 512,
            ..Limits::default()
        });
        let peers: Vec<Arc<Share>> = (0..9).map(|_| Arc::default()).collect();
        let mut places = Vec::new();
        for _ in 0..100 {
            places.extend(peers.iter().filter_map(|peer| admission.place(peer).ok()));
        }
        assert_eq!(places.len(), 512 - 512 / RESERVE);
        let probe = Arc::default();
        assert!(admission.place(&probe).is_ok());
        places.clear();
        *locked(&admission.0.refused) = Instant::now().checked_sub(CROWDED);
        places.extend((0..512).filter_map(|_| admission.place(&peers[0]).ok()));
        assert_eq!(places.len(), 512, "alone, it has all of them");
    }

    #[tokio::test]
    async fn a_peer_with_nearly_all_places_lets_another_grow() {
        let admission = Admission::new(&Limits {
            in_flight: 512,
            ..Limits::default()
        });
        let (greedy, other): (Arc<Share>, Arc<Share>) = Default::default();
        let mut others: Vec<_> = (0..20)
            .filter_map(|_| admission.place(&other).ok())
            .collect();
        let mut places = Vec::new();
        places.extend((0..512).filter_map(|_| admission.place(&greedy).ok()));
        assert_eq!(places.len(), 512 - 512 / RESERVE - 20);
        // its calls end one by one, and it asks first for the place that is free
        for _ in 0..512 {
            places.pop();
            places.extend(admission.place(&greedy));
            others.extend(admission.place(&other));
        }
        assert_eq!(places.len(), 512 / 2);
        assert_eq!(others.len(), 512 - 512 / RESERVE - places.len());
    }

    #[tokio::test]
    async fn a_peer_has_a_quarter_of_the_bytes_and_one_message_always() {
        let (admission, one, other) = (admission(), Arc::default(), Arc::default());
        let held = admission.bytes(&one, 600).ok().unwrap();
        assert_eq!(admission.bytes(&one, 600).err(), Some(Bound::Bytes));
        assert!(admission.bytes(&one, 400).is_ok());
        assert!(
            admission.bytes(&other, 2_900).is_ok(),
            "larger than a quarter, but one"
        );
        drop(held);
        assert!(admission.bytes(&one, 1_000).is_ok());
        assert_eq!(one.bytes.load(Ordering::Relaxed), 0);
        assert_eq!(admission.0.bytes.available_permits(), 4_000);
    }

    #[tokio::test]
    async fn several_peers_leave_bytes_for_one_that_asks_for_few() {
        let admission = admission();
        let (peers, late): ([Arc<Share>; 6], Arc<Share>) = <_>::default();
        let mut taken = Vec::new();
        // in small pieces, of which the last one would fit
        for _ in 0..4_000 {
            taken.extend(
                peers
                    .iter()
                    .filter_map(|peer| admission.bytes(peer, 1).ok()),
            );
        }
        assert_eq!(taken.len(), 4_000 - 4_000 / RESERVE);
        assert!(admission.bytes(&late, 4_000 / SMALL).is_ok());
        assert_eq!(admission.bytes(&late, 400).err(), Some(Bound::Bytes));
    }

    #[tokio::test]
    async fn a_certificate_has_one_share_and_others_one_each() {
        let admission = admission();
        let (one, same) = (admission.share(Some("a")), admission.share(Some("a")));
        assert!(Arc::ptr_eq(&one, &same));
        assert!(!Arc::ptr_eq(&one, &admission.share(Some("b"))));
        assert!(!Arc::ptr_eq(&admission.share(None), &admission.share(None)));
        drop((one, same));
        admission.share(Some("c"));
        assert!(
            locked(&admission.0.named).len() <= 1,
            "nobody is remembered for ever"
        );
    }

    #[tokio::test]
    async fn connections_over_the_limit_are_told_and_then_not_even_that() {
        let admission = admission();
        let seats: Vec<_> = (0..2 + TOLD).map(|_| admission.seat().unwrap()).collect();
        assert_eq!(seats.iter().filter(|seat| seat.over).count(), TOLD);
        assert!(admission.seat().is_none());
        drop(seats);
        assert!(!admission.seat().unwrap().over);
    }
}
