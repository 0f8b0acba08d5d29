//! The queue for a pool's connections. Peers take turns: a peer that sends hundreds of calls at once
//! waits for its own calls, and the call of another peer is next. Of the calls that lock the same
//! row, only some may wait for it in the database, where each occupies a connection.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::peer::PeerId;

/// Permits that go to the waiting peers by turns.
pub(super) struct Queue {
    state: Mutex<State>,
}

struct State {
    free: usize,
    closed: bool,
    /// Peers that wait, in the order of their turns, each with its calls in the order they came.
    waiting: VecDeque<(PeerId, VecDeque<oneshot::Sender<Permit>>)>,
}

/// A place in the pool, until it is dropped.
pub(super) struct Permit(Option<Arc<Queue>>);

/// The pool was closed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Closed;

impl Queue {
    pub(super) fn new(permits: usize) -> Arc<Queue> {
        Arc::new(Queue {
            state: Mutex::new(State {
                free: permits,
                closed: false,
                waiting: VecDeque::new(),
            }),
        })
    }

    /// Waits for a permit. A caller that stops waiting loses its turn.
    ///
    /// # Errors
    /// [`Closed`]
    pub(super) async fn acquire(self: &Arc<Self>, peer: PeerId) -> Result<Permit, Closed> {
        let granted = {
            let mut state = self.state();
            if state.closed {
                return Err(Closed);
            }
            if state.free > 0 {
                state.free -= 1;
                return Ok(Permit(Some(self.clone())));
            }
            let (sender, granted) = oneshot::channel();
            match state.waiting.iter_mut().find(|(other, _)| *other == peer) {
                Some((_, calls)) => {
                    // no permit may be released for long, and no call be taken out meanwhile
                    if calls.len() == calls.capacity() {
                        calls.retain(|call| !call.is_closed());
                    }
                    calls.push_back(sender);
                }
                None => {
                    if state.waiting.len() == state.waiting.capacity() {
                        let waits = |call: &oneshot::Sender<Permit>| !call.is_closed();
                        state.waiting.retain(|(_, calls)| calls.iter().any(waits));
                    }
                    state.waiting.push_back((peer, [sender].into()));
                }
            }
            granted
        };
        granted.await.map_err(|_| Closed)
    }

    /// Ends all waiting; no permit is given any more.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.waiting.clear();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    fn release(self: Arc<Self>) {
        let mut permit = Permit(Some(self.clone()));
        while let Some(next) = self.next() {
            match next.send(permit) {
                Ok(()) => return,
                // that caller has stopped waiting
                Err(refused) => permit = refused,
            }
        }
        // its place is free, counted by `next`
        permit.0 = None;
    }

    /// The call whose turn it is. Without one, the permit is counted as free.
    fn next(&self) -> Option<oneshot::Sender<Permit>> {
        let mut state = self.state();
        let next = state.waiting.pop_front().and_then(|(peer, mut calls)| {
            let next = calls.pop_front();
            if !calls.is_empty() {
                state.waiting.push_back((peer, calls));
            }
            next
        });
        state.free += usize::from(next.is_none());
        next
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(queue) = self.0.take() {
            queue.release();
        }
    }
}

/// A bound on the calls that wait for one row at once.
pub(super) struct RowBound {
    each: usize,
    rows: Mutex<HashMap<i64, Weak<Semaphore>>>,
}

impl RowBound {
    pub(super) fn new(each: usize) -> RowBound {
        RowBound {
            each,
            rows: Mutex::default(),
        }
    }

    /// Waits until few enough others wait for `row`. The permit is held for as long as the row is
    /// waited for and locked.
    pub(super) async fn acquire(&self, row: i64) -> Option<OwnedSemaphorePermit> {
        let semaphore = {
            let mut rows = locked(&self.rows);
            match rows.get(&row).and_then(Weak::upgrade) {
                Some(semaphore) => semaphore,
                None => {
                    // unused rows are removed when the map would have to grow
                    if rows.len() == rows.capacity() {
                        rows.retain(|_, semaphore| semaphore.strong_count() > 0);
                    }
                    let semaphore = Arc::new(Semaphore::new(self.each));
                    rows.insert(row, Arc::downgrade(&semaphore));
                    semaphore
                }
            }
        };
        // never closed
        semaphore.acquire_owned().await.ok()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{future::Future, task::Poll};

    use futures::poll;

    use super::*;

    fn taken<T>(polled: Poll<Result<T, Closed>>) -> T {
        match polled {
            Poll::Ready(Ok(permit)) => permit,
            Poll::Ready(Err(Closed)) => panic!("closed"),
            Poll::Pending => panic!("waits"),
        }
    }

    fn of(
        queue: &Arc<Queue>,
        peer: PeerId,
    ) -> std::pin::Pin<Box<impl Future<Output = Result<Permit, Closed>>>> {
        let queue = queue.clone();
        Box::pin(async move { queue.acquire(peer).await })
    }

    #[tokio::test]
    async fn a_peer_with_one_call_goes_before_the_second_call_of_another() {
        let queue = Queue::new(1);
        let peers = [(); 4].map(|()| PeerId::unused());
        let held = taken(poll!(of(&queue, peers[0])));
        let (mut first, mut second, mut third) = (
            of(&queue, peers[0]),
            of(&queue, peers[0]),
            of(&queue, peers[0]),
        );
        let (mut one, mut other) = (of(&queue, peers[1]), of(&queue, peers[2]));
        for waiting in [&mut first, &mut second, &mut third, &mut one, &mut other] {
            assert!(poll!(waiting).is_pending());
        }
        drop(held);
        drop(taken(poll!(&mut first)));
        assert!(poll!(&mut second).is_pending());
        drop(taken(poll!(&mut one)));
        assert!(poll!(&mut second).is_pending());
        drop(taken(poll!(&mut other)));
        drop(taken(poll!(&mut second)));
        drop(taken(poll!(&mut third)));
        drop(taken(poll!(of(&queue, peers[3]))));
    }

    #[tokio::test]
    async fn a_caller_that_leaves_takes_no_permit_with_it() {
        let queue = Queue::new(1);
        let peers = [(); 4].map(|()| PeerId::unused());
        let held = taken(poll!(of(&queue, peers[0])));
        let (mut first, mut second, mut third) = (
            of(&queue, peers[0]),
            of(&queue, peers[0]),
            of(&queue, peers[1]),
        );
        for waiting in [&mut first, &mut second, &mut third] {
            assert!(poll!(waiting).is_pending());
        }
        drop(first);
        drop(held);
        // granted, and never looked at
        drop(second);
        let held = taken(poll!(&mut third));
        assert!(poll!(of(&queue, peers[0])).is_pending());
        drop(held);
        let held = taken(poll!(of(&queue, peers[0])));
        let mut last = of(&queue, peers[0]);
        assert!(poll!(&mut last).is_pending());
        queue.close();
        assert_eq!(last.await.err(), Some(Closed));
        assert_eq!(queue.acquire(peers[0]).await.err(), Some(Closed));
        drop(held);
    }

    #[tokio::test]
    async fn calls_that_left_are_not_kept_while_nothing_is_released() {
        let queue = Queue::new(1);
        let one = PeerId::unused();
        let held = taken(poll!(of(&queue, one)));
        let mut stays = of(&queue, one);
        assert!(poll!(&mut stays).is_pending());
        for _ in 0..10_000 {
            assert!(poll!(of(&queue, one)).is_pending());
            assert!(poll!(of(&queue, PeerId::unused())).is_pending());
        }
        {
            let state = queue.state();
            assert!(state.waiting.len() < 100, "{} peers", state.waiting.len());
            let kept = state.waiting.iter().map(|(_, calls)| calls.len());
            assert!(kept.sum::<usize>() < 200);
        }
        drop(held);
        taken(poll!(&mut stays));
    }

    #[tokio::test]
    async fn one_row_is_waited_for_by_few() {
        let bound = RowBound::new(2);
        let (first, _second) = (bound.acquire(1).await, bound.acquire(1).await);
        let mut third = Box::pin(bound.acquire(1));
        assert!(poll!(&mut third).is_pending());
        bound.acquire(2).await;
        drop(first);
        assert!(poll!(&mut third).is_ready());
        for row in 10..10_000 {
            bound.acquire(row).await;
        }
        let rows = locked(&bound.rows);
        assert!(rows.len() < 100, "{} rows are remembered", rows.len());
        assert!(rows.contains_key(&1));
    }
}
