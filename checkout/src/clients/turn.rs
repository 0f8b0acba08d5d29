//! A caller's place in the line for slots. It waits for one slot at a time, so a cart of 500 lines does not starve a cart of
//! 2, and it keeps its place when somebody else has asked for what it was about to ask for: it needs others still.

use std::{
    future,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures::{FutureExt as _, future::BoxFuture};
use tokio::sync::Mutex;

use super::allowance::{Allowance, Slot};

/// One call's; all that it looks up goes through it.
#[derive(Default)]
pub struct Turn {
    /// The place, used by one look-up at a time and left to the next.
    place: Mutex<Option<BoxFuture<'static, Slot>>>,
    /// Look-ups that want a slot.
    wanting: AtomicUsize,
}

impl Turn {
    /// Waits for a slot and spends it; `false` when `spend` gave it back, for the next look-up of this call.
    pub async fn spend(
        &self,
        allowance: &Allowance,
        spend: impl FnOnce(Slot) -> Option<Slot>,
    ) -> bool {
        let _wanting = Wanting::new(self);
        let mut place = self.place.lock().await;
        let waiting = place.get_or_insert_with(|| {
            let allowance = allowance.clone();
            async move { allowance.acquire().await }.boxed()
        });
        let slot = waiting.await;
        *place = None;
        let Some(slot) = spend(slot) else { return true };
        *place = Some(future::ready(slot).boxed());
        false
    }
}

/// The last one gives the place up: nobody would wait there, and hold up all who come after.
struct Wanting<'a>(&'a Turn);

impl<'a> Wanting<'a> {
    fn new(turn: &'a Turn) -> Self {
        turn.wanting.fetch_add(1, Ordering::SeqCst);
        Self(turn)
    }
}

impl Drop for Wanting<'_> {
    fn drop(&mut self) {
        let is_last = self.0.wanting.fetch_sub(1, Ordering::SeqCst) == 1;
        // whoever has it locked has come since, and will use it
        if is_last && let Ok(mut place) = self.0.place.try_lock() {
            *place = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{task::Poll, time::Duration};

    use futures::poll;

    use super::*;

    fn spent(slot: Slot) -> Option<Slot> {
        drop(slot);
        None
    }

    fn one_at_once() -> Allowance {
        Allowance::new(10, 1, Duration::ZERO)
    }

    #[tokio::test]
    async fn a_caller_keeps_its_place_when_somebody_else_was_quicker() {
        let (allowance, turn, other) = (one_at_once(), Turn::default(), Turn::default());
        let held = allowance.acquire().await;
        let mut first = Box::pin(turn.spend(&allowance, spent));
        let mut second = Box::pin(turn.spend(&allowance, spent));
        let mut later = Box::pin(other.spend(&allowance, spent));
        assert!(poll!(&mut first).is_pending());
        assert!(poll!(&mut second).is_pending());
        assert!(poll!(&mut later).is_pending());
        drop(first);
        drop(held);
        assert!(poll!(&mut later).is_pending());
        assert_eq!(poll!(&mut second), Poll::Ready(true));
        assert_eq!(poll!(&mut later), Poll::Ready(true));
    }

    #[tokio::test]
    async fn a_slot_is_for_one_look_up_then_it_is_the_others_turn() {
        let (allowance, turn, other) = (one_at_once(), Turn::default(), Turn::default());
        let held = allowance.acquire().await;
        let mut first = Box::pin(turn.spend(&allowance, spent));
        let mut second = Box::pin(turn.spend(&allowance, spent));
        let mut later = Box::pin(other.spend(&allowance, spent));
        assert!(poll!(&mut first).is_pending());
        assert!(poll!(&mut second).is_pending());
        assert!(poll!(&mut later).is_pending());
        drop(held);
        assert_eq!(poll!(&mut first), Poll::Ready(true));
        assert!(poll!(&mut second).is_pending());
        assert_eq!(poll!(&mut later), Poll::Ready(true));
        assert_eq!(poll!(&mut second), Poll::Ready(true));
    }

    #[tokio::test]
    async fn a_slot_that_was_not_needed_is_the_next_look_ups() {
        let (allowance, turn, other) = (one_at_once(), Turn::default(), Turn::default());
        let mut second = Box::pin(turn.spend(&allowance, spent));
        {
            let held = allowance.acquire().await;
            let mut first = Box::pin(turn.spend(&allowance, Some));
            assert!(poll!(&mut first).is_pending());
            assert!(poll!(&mut second).is_pending());
            drop(held);
            assert_eq!(poll!(&mut first), Poll::Ready(false));
        }
        let mut later = Box::pin(other.spend(&allowance, spent));
        assert!(poll!(&mut later).is_pending(), "the slot is kept");
        assert_eq!(poll!(&mut second), Poll::Ready(true));
        assert_eq!(poll!(&mut later), Poll::Ready(true));
    }

    #[tokio::test]
    async fn a_place_that_nobody_wants_is_given_up() {
        let (allowance, turn, other) = (one_at_once(), Turn::default(), Turn::default());
        let held = allowance.acquire().await;
        let mut only = Box::pin(turn.spend(&allowance, spent));
        let mut later = Box::pin(other.spend(&allowance, spent));
        assert!(poll!(&mut only).is_pending());
        assert!(poll!(&mut later).is_pending());
        drop(only);
        drop(held);
        assert_eq!(poll!(&mut later), Poll::Ready(true));
        // so is a slot
        assert!(!turn.spend(&allowance, Some).await);
        assert!(other.spend(&allowance, spent).await);
    }
}
