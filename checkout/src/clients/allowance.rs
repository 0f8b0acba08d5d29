//! What ProductService allows: so many requests in any second and so many at once, for the whole process. A sliding
//! window, because a token bucket with a burst of ten lets twenty through in its first second.
//!
//! It is exact where it is counted, at the other end: a request's second begins when it has arrived there. That is known
//! once its answer is back; of an answer that takes longer than `margin` it is also known how long answers usually take,
//! and only what it took beyond that can have been spent on the road.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Mutex as Queue, Notify},
    time::Instant,
};

const SECOND: Duration = Duration::from_secs(1);
/// As many answers say how long one usually takes: enough that a few late ones are seen as such.
const REMEMBERED: usize = 15;

/// The allowance; clones share it.
#[derive(Clone)]
pub struct Allowance(Arc<Shared>);

struct Shared {
    /// Fair: who comes first is first, and only the first looks at the state.
    queue: Queue<()>,
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    /// When each request of the window that is not on its way may be sent again; requests on their way have no entry.
    free: Vec<Instant>,
    running: usize,
    at_once: usize,
    last_answer: Option<Instant>,
    /// How long the last answers took, the newest at the end.
    took: VecDeque<Duration>,
    margin: Duration,
}

/// The right to send one request. Dropped unused it goes to the next at once.
pub struct Slot {
    shared: Arc<Shared>,
    free: Instant,
    sent: Option<Sent>,
}

struct Sent {
    at: Instant,
    /// The connection was seen to work just before, so this request need not wait for one.
    warm: bool,
    answered: bool,
}

impl Allowance {
    /// `per_second` requests in any second, `at_once` of them unanswered; at least one of each.
    pub fn new(per_second: usize, at_once: usize, margin: Duration) -> Self {
        Self(Arc::new(Shared {
            queue: Queue::new(()),
            state: Mutex::new(State::new(per_second, at_once, margin, Instant::now())),
            changed: Notify::new(),
        }))
    }

    /// Waits in line for a slot. Leaving the line costs nothing.
    pub async fn acquire(&self) -> Slot {
        let _first = self.0.queue.lock().await;
        loop {
            let next = self.0.lock().next(Instant::now());
            match next {
                Next::Now(free) => {
                    return Slot {
                        shared: self.0.clone(),
                        free,
                        sent: None,
                    };
                }
                Next::At(free) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(free) => {}
                        () = self.0.changed.notified() => {}
                    }
                }
                Next::WhenReturned => self.0.changed.notified().await,
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Next {
    Now(Instant),
    At(Instant),
    WhenReturned,
}

/// The arithmetic, with the time as an argument.
impl State {
    fn new(per_second: usize, at_once: usize, margin: Duration, now: Instant) -> Self {
        Self {
            free: vec![now; per_second.max(1)],
            running: 0,
            at_once: at_once.max(1),
            last_answer: None,
            took: VecDeque::with_capacity(REMEMBERED),
            margin,
        }
    }

    fn next(&mut self, now: Instant) -> Next {
        if self.running >= self.at_once {
            return Next::WhenReturned;
        }
        let earliest = self.free.iter().enumerate().min_by_key(|(_, free)| **free);
        let Some((index, free)) = earliest.map(|(index, free)| (index, *free)) else {
            return Next::WhenReturned;
        };
        if free > now {
            return Next::At(free);
        }
        self.free.swap_remove(index);
        self.running += 1;
        Next::Now(free)
    }

    fn send(&self, now: Instant) -> Sent {
        let warm = self
            .last_answer
            .is_some_and(|answer| now.duration_since(answer) < SECOND);
        Sent {
            at: now,
            warm,
            answered: false,
        }
    }

    fn give_back(&mut self, free: Instant, sent: Option<&Sent>, now: Instant) {
        self.running -= 1;
        let Some(sent) = sent else {
            return self.free.push(free);
        };
        self.free.push(self.arrived(sent, now) + SECOND);
        if sent.answered {
            self.last_answer = Some(now);
            if self.took.len() == REMEMBERED {
                self.took.pop_front();
            }
            self.took.push_back(now.duration_since(sent.at));
        }
    }

    /// The latest that a request which is over now can have arrived there.
    fn arrived(&self, sent: &Sent, now: Instant) -> Instant {
        match self.usual() {
            Some(usual) if sent.warm => {
                let longer = now.duration_since(sent.at).saturating_sub(usual);
                now.min(sent.at + self.margin + longer)
            }
            _ => now,
        }
    }

    /// The median: a few late answers do not change what is usual.
    fn usual(&self) -> Option<Duration> {
        let mut took: Vec<_> = self.took.iter().copied().collect();
        took.sort_unstable();
        took.get(took.len() / 2).copied()
    }
}

impl Slot {
    /// The request is about to be sent.
    pub fn send(&mut self) {
        self.sent = Some(self.shared.lock().send(Instant::now()));
    }

    /// ProductService has answered, so the connection works.
    pub fn answered(&mut self) {
        if let Some(sent) = &mut self.sent {
            sent.answered = true;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let now = Instant::now();
        self.shared
            .lock()
            .give_back(self.free, self.sent.as_ref(), now);
        self.shared.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARGIN: Duration = Duration::from_millis(75);

    /// When a request arrived at the other end, when it left there, when its answer was back.
    type Seen = (Instant, Instant, Instant);

    fn play(state: &mut State, now: Instant, count: usize, way: u64, work: u64) -> Vec<Seen> {
        play_each(state, now, count, |_| (way, work))
    }

    /// Sends `count` requests from `now` on as fast as the state lets them, the n-th so many milliseconds away from the
    /// other end, where it takes so many. Time is simulated, from one event to the next.
    fn play_each(
        state: &mut State,
        mut now: Instant,
        count: usize,
        road: impl Fn(usize) -> (u64, u64),
    ) -> Vec<Seen> {
        let (mut seen, mut flying): (Vec<Seen>, Vec<(Instant, Sent, Instant)>) = (vec![], vec![]);
        while seen.len() < count || !flying.is_empty() {
            flying.sort_by_key(|(back, ..)| *back);
            let back = flying.first().map(|(back, ..)| *back);
            if back.is_some_and(|back| back <= now) {
                let (_, mut sent, free) = flying.remove(0);
                sent.answered = true;
                state.give_back(free, Some(&sent), now);
                continue;
            }
            let next = if seen.len() < count {
                state.next(now)
            } else {
                Next::WhenReturned
            };
            match next {
                Next::Now(free) => {
                    let (way, work) = road(seen.len());
                    let (way, work) = (Duration::from_millis(way), Duration::from_millis(work));
                    let arrives = now + way;
                    seen.push((arrives, arrives + work, arrives + work + way));
                    flying.push((arrives + work + way, state.send(now), free));
                }
                Next::At(free) => now = back.map_or(free, |back| back.min(free)),
                Next::WhenReturned => now = back.expect("something is on its way"),
            }
        }
        seen
    }

    fn most_in_a_second(seen: &[Seen]) -> usize {
        let within = |from: &Seen| {
            seen.iter()
                .filter(|s| s.0 >= from.0 && s.0 < from.0 + SECOND)
                .count()
        };
        seen.iter().map(within).max().unwrap_or(0)
    }

    fn most_at_once(seen: &[Seen]) -> usize {
        let inside = |at: &Seen| seen.iter().filter(|s| s.0 <= at.0 && at.0 < s.1).count();
        seen.iter().map(inside).max().unwrap_or(0)
    }

    #[test]
    fn never_more_than_allowed_and_hardly_less() {
        for (way, work) in [(0, 0), (1, 3), (40, 0), (10, 450), (0, 499), (5, 1_500)] {
            let began = Instant::now();
            let mut state = State::new(10, 5, MARGIN, began);
            let seen = play(&mut state, began, 200, way, work);
            assert!(
                most_in_a_second(&seen) <= 10,
                "{way} ms away, {work} ms of work"
            );
            assert!(most_at_once(&seen) <= 5, "{way} ms away, {work} ms of work");
            let took = seen.last().unwrap().0.duration_since(began).as_secs_f64();
            let turn = (2 * way + work) as f64 / 1000.0;
            let allowed = if turn > 0.5 { 5.0 / turn } else { 10.0 };
            assert!(
                200.0 / took > 0.9 * allowed,
                "{way} ms away, {work} ms of work: {took} s"
            );
        }
    }

    #[test]
    fn a_small_burst_is_answered_at_once() {
        let began = Instant::now();
        let seen = play(&mut State::new(10, 5, MARGIN, began), began, 10, 0, 5);
        assert!(
            seen.iter()
                .all(|s| s.2 <= began + Duration::from_millis(10))
        );
    }

    #[test]
    fn a_slow_connect_does_not_squeeze_two_seconds_into_one() {
        let began = Instant::now();
        let mut state = State::new(10, 5, MARGIN, began);
        // as when the first requests wait for a handshake: they arrive long after they were sent
        let mut seen = play(&mut state, began, 5, 400, 0);
        let then = seen.iter().map(|s| s.2).max().unwrap();
        seen.extend(play(&mut state, then, 20, 0, 0));
        assert!(most_in_a_second(&seen) <= 10);
    }

    #[test]
    fn a_request_that_arrives_late_moves_its_second() {
        for work in [0, 20, 300] {
            let began = Instant::now();
            let mut state = State::new(10, 5, MARGIN, began);
            // now and then one hangs on the road, as on a busy machine or after a lost packet
            let road = |n: usize| (if n % 17 == 16 { 250 } else { 2 }, work);
            let seen = play_each(&mut state, began, 300, road);
            assert!(most_in_a_second(&seen) <= 10, "{work} ms of work");
            assert!(most_at_once(&seen) <= 5, "{work} ms of work");
        }
    }

    #[tokio::test]
    async fn an_unused_slot_and_a_left_line_cost_nothing() {
        let allowance = Allowance::new(2, 1, MARGIN);
        for _ in 0..5 {
            drop(allowance.acquire().await);
        }
        let mut held = allowance.acquire().await;
        held.send();
        let left = tokio::time::timeout(Duration::from_millis(10), allowance.acquire()).await;
        assert!(left.is_err(), "one at once");
        drop(held);
        let second = tokio::time::timeout(Duration::from_millis(100), allowance.acquire()).await;
        assert!(second.is_ok(), "two in a second");
    }

    #[tokio::test]
    async fn the_line_is_fair() {
        let allowance = Allowance::new(10, 1, MARGIN);
        let order = Mutex::new(Vec::new());
        let turn = async |name: u32| {
            let _slot = allowance.acquire().await;
            order.lock().unwrap().push(name);
            tokio::task::yield_now().await;
        };
        tokio::join!(turn(1), turn(2), turn(3), turn(4));
        assert_eq!(*order.lock().unwrap(), [1, 2, 3, 4]);
    }
}
