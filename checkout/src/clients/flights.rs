//! What is being asked for: one flight a SKU, however many ask. A flight leaves the list when it lands, or with the last
//! who waits for it, so the list is as long as there is demand and nobody has to look through it.

use std::{
    collections::HashMap,
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use tokio::sync::watch;

use crate::cart::Sku;

/// The flights that somebody waits for, each with an answer of `A`.
pub struct Flights<A>(Arc<Listed<A>>);

struct Listed<A>(Mutex<HashMap<Sku, Weak<Flight<A>>>>);

/// One question, and all who wait for its answer.
pub struct Flight<A> {
    sku: Sku,
    list: Arc<Listed<A>>,
    state: watch::Sender<State<A>>,
}

/// How far a flight is.
pub enum State<A> {
    /// Nobody had a slot for it yet.
    Waiting,
    /// Its request is on its way.
    Launched,
    /// A request failed so, and there may be another.
    Failing(A),
    /// The answer.
    Landed(A),
}

impl<A> Default for Flights<A> {
    fn default() -> Self {
        Self(Arc::new(Listed(Mutex::default())))
    }
}

impl<A> Flights<A> {
    /// The flight for a SKU, a new one if there is none.
    pub fn join(&self, sku: Sku) -> Arc<Flight<A>> {
        let mut flights = self.0.lock();
        if let Some(flight) = flights.get(&sku).and_then(Weak::upgrade) {
            return flight;
        }
        let flight = Arc::new(Flight {
            sku,
            list: self.0.clone(),
            state: watch::Sender::new(State::Waiting),
        });
        flights.insert(sku, Arc::downgrade(&flight));
        flight
    }
}

impl<A> Listed<A> {
    fn lock(&self) -> MutexGuard<'_, HashMap<Sku, Weak<Flight<A>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<A> Flight<A> {
    /// For waiting until it is somewhere.
    pub fn subscribe(&self) -> watch::Receiver<State<A>> {
        self.state.subscribe()
    }

    /// `false` when somebody else was quicker.
    pub fn launch(&self) -> bool {
        self.state.send_if_modified(|state| {
            let waiting = matches!(state, State::Waiting);
            if waiting {
                *state = State::Launched;
            }
            waiting
        })
    }

    /// Notes what is known should nobody wait for the landing.
    pub fn fail(&self, answer: A) {
        self.state.send_replace(State::Failing(answer));
    }

    /// What there is to say to one who cannot wait any longer.
    pub fn known(&self) -> Option<A>
    where
        A: Clone,
    {
        match &*self.state.borrow() {
            State::Waiting | State::Launched => None,
            State::Failing(answer) | State::Landed(answer) => Some(answer.clone()),
        }
    }

    /// Tells all who wait. First out of the list: who comes now finds the cache, or begins a flight of its own.
    pub fn land(&self, answer: A) {
        self.leave();
        self.state.send_replace(State::Landed(answer));
    }

    /// Another flight for the SKU may have begun since.
    fn leave(&self) {
        let mut flights = self.list.lock();
        let listed = flights.get(&self.sku);
        if listed.is_some_and(|listed| ptr::eq(listed.as_ptr(), self)) {
            flights.remove(&self.sku);
        }
    }
}

impl<A> Drop for Flight<A> {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sku(sku: u32) -> Sku {
        Sku::new(sku).unwrap()
    }

    #[test]
    fn a_flight_is_shared_and_gone_with_the_last_who_waits() {
        let flights = Flights::<()>::default();
        let (first, second) = (flights.join(sku(1)), flights.join(sku(1)));
        assert!(Arc::ptr_eq(&first, &second));
        drop(first);
        assert_eq!(flights.0.lock().len(), 1);
        drop(second);
        assert_eq!(flights.0.lock().len(), 0);
    }

    #[test]
    fn callers_who_leave_leave_nothing_behind() {
        let flights = Flights::<()>::default();
        let waiting: Vec<_> = (1..=10_000).map(|n| flights.join(sku(n))).collect();
        assert_eq!(flights.0.lock().len(), 10_000);
        drop(waiting);
        assert_eq!(flights.0.lock().len(), 0);
    }

    #[test]
    fn one_launches_and_who_comes_after_the_landing_begins_anew() {
        let flights = Flights::default();
        let flight = flights.join(sku(1));
        assert!(flight.launch());
        assert!(!flights.join(sku(1)).launch());
        assert_eq!(flight.known(), None);
        flight.fail(6);
        assert_eq!(flights.join(sku(1)).known(), Some(6));
        flight.land(7);
        assert!(matches!(*flight.subscribe().borrow(), State::Landed(7)));
        let next = flights.join(sku(1));
        drop(flight);
        assert!(Arc::ptr_eq(&next, &flights.join(sku(1))));
        assert!(next.launch());
    }
}
