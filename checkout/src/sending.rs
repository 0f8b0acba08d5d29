//! What LOMS is asked about an open purchase, and what may be sent to it. A LOMS that keeps keys
//! gives the same order for the same key, as often as it is asked. One that ignores them makes
//! another order each time: an order is sent to it only if the order cannot have been sent before,
//! to any LOMS, and a cancellation is sent once. Each is written down before it is sent.

use std::sync::atomic::{AtomicBool, Ordering};

use fail::fail_point;
use futures::FutureExt as _;
use platform::{
    grpc::Deadline,
    pg::{Db, Pool},
};

use crate::{
    clients::loms::{Cancellation, Keys, Loms, Placement},
    error::Error,
    purchase::{self, OpenPurchase, Order, OrderId, Outcome, Verdict},
    store::purchases::{self as store, SentMark},
};

/// What one driver of a purchase knows of what was sent.
#[derive(Default)]
pub struct Sending {
    /// Its own mark, if it began the purchase: with it, the purchase counts as sent already.
    begun: Option<SentMark>,
    sent: AtomicBool,
    /// It was marked and not sent: it is too old.
    refrained: AtomicBool,
}

impl Sending {
    /// Of the driver that has just begun the purchase.
    pub fn begun(mark: SentMark) -> Self {
        Self {
            begun: Some(mark),
            ..Self::default()
        }
    }

    /// Its mark, if it has not sent the purchase.
    pub fn unsent(&self) -> Option<SentMark> {
        self.begun.filter(|_| !self.sent.load(Ordering::Relaxed))
    }
}

/// Asks LOMS; clones share everything.
#[derive(Clone)]
pub struct Sender {
    pool: Pool,
    loms: Loms,
}

impl Sender {
    /// What is sent is written down in `pool`.
    pub fn new(pool: Pool, loms: Loms) -> Self {
        Self { pool, loms }
    }

    /// How the purchase stands; an old one is cancelled if that is still possible.
    ///
    /// # Errors
    /// LOMS or the database does not answer, or the order is not decided.
    pub async fn ask(
        &self,
        purchase: &OpenPurchase,
        sending: &Sending,
        deadline: Deadline,
    ) -> Result<Outcome, Error> {
        let order = match purchase.order {
            Some(id) => match self.look_up(purchase, id, deadline).await? {
                Some(order) => order,
                None => return missing(purchase, id),
            },
            None if purchase.sent_keyless => return undecided(purchase),
            None => {
                let permit = |keys| self.may_place(purchase, sending, keys).boxed();
                match self.loms.place(purchase, deadline, &permit).await? {
                    Placement::Placed(order) => order,
                    Placement::Made(id) => {
                        self.note(purchase, id).await;
                        match self.look_up(purchase, id, deadline).await? {
                            Some(order) => order,
                            None => return missing(purchase, id),
                        }
                    }
                    Placement::Refused(reason) => return Ok(Outcome::Refused { reason }),
                    Placement::NotSent if sending.refrained.load(Ordering::Relaxed) => {
                        let reason = "it is too old to be sent to a loms that ignores keys";
                        return Ok(Outcome::Refused {
                            reason: reason.to_owned(),
                        });
                    }
                    Placement::NotSent => return undecided(purchase),
                }
            }
        };
        fail_point!("order-placed", |_| std::process::abort());
        self.decide(purchase, order, deadline).await
    }

    /// What becomes of a purchase whose order is known.
    async fn decide(
        &self,
        purchase: &OpenPurchase,
        order: Order,
        deadline: Deadline,
    ) -> Result<Outcome, Error> {
        let (id, given_up) = (order.id, purchase.is_given_up());
        let verdict = match purchase::judge(order, purchase.resolving, given_up) {
            Verdict::Cancel => {
                let permit = |keys| self.may_cancel(purchase, keys).boxed();
                let cancelled = self.loms.cancel(id, deadline, &permit).await?;
                if let Cancellation::Done = cancelled {
                    return Ok(Outcome::Cancelled { order: id });
                }
                let Some(order) = self.look_up(purchase, id, deadline).await? else {
                    return missing(purchase, id);
                };
                match purchase::judge(order, true, given_up) {
                    Verdict::Cancel if purchase.cancel_sent_long_ago => {
                        Verdict::Close(Outcome::Unknown { order: Some(id) })
                    }
                    verdict => verdict,
                }
            }
            verdict => verdict,
        };
        match verdict {
            Verdict::Close(outcome) => Ok(outcome),
            Verdict::Cancel | Verdict::Wait => Err(Error::OrderUndecided { order: id }),
        }
    }

    /// Writes the order down. It goes on without: what LOMS says of the order closes the purchase.
    async fn note(&self, purchase: &OpenPurchase, id: OrderId) {
        let note = async |db: &mut Db| store::note_order(db, purchase.id, id).await;
        if let Err(error) = self.pool.repeatable(note).await {
            tracing::error!(purchase.id = %purchase.id, order.id = id.0, error = %error,
                "order of an open purchase was not written down");
        }
    }

    async fn look_up(
        &self,
        purchase: &OpenPurchase,
        id: OrderId,
        deadline: Deadline,
    ) -> Result<Option<Order>, Error> {
        let status = self.loms.status(id, purchase.user, deadline).await?;
        Ok(status.map(|status| Order {
            id,
            status,
            shortages: vec![],
        }))
    }

    async fn may_place(
        &self,
        purchase: &OpenPurchase,
        sending: &Sending,
        keys: Keys,
    ) -> Result<bool, Error> {
        let sent = sending.sent.load(Ordering::Relaxed);
        let may = match keys {
            Keys::Kept if sent || sending.begun.is_some() => true,
            Keys::Kept => {
                let mark = async |db: &mut Db| store::mark_sent(db, purchase.id).await;
                self.pool.repeatable(mark).await?
            }
            Keys::Ignored if sent => false,
            Keys::Ignored => {
                let unsent = sending.unsent();
                let mark =
                    async |db: &mut Db| store::mark_sent_keyless(db, purchase.id, unsent).await;
                let marked = self.pool.repeatable(mark).await?;
                // an old purchase is not sent, its order would only be cancelled; the mark keeps
                // other drivers from sending it
                sending
                    .refrained
                    .store(marked && purchase.resolving, Ordering::Relaxed);
                marked && !purchase.resolving
            }
        };
        if may {
            sending.sent.store(true, Ordering::Relaxed);
        }
        Ok(may)
    }

    async fn may_cancel(&self, purchase: &OpenPurchase, keys: Keys) -> Result<bool, Error> {
        let mark = async |db: &mut Db| store::mark_cancel_sent(db, purchase.id).await;
        let is_first = self.pool.repeatable(mark).await?;
        Ok(is_first || keys == Keys::Kept)
    }
}

/// What is to be made of a purchase that may have an order, and must not be sent again.
fn undecided(purchase: &OpenPurchase) -> Result<Outcome, Error> {
    if purchase.is_given_up() {
        Ok(Outcome::Unknown { order: None })
    } else {
        Err(Error::OrderOutcomePending)
    }
}

/// The same of one whose order LOMS does not have: it is another LOMS.
fn missing(purchase: &OpenPurchase, id: OrderId) -> Result<Outcome, Error> {
    if purchase.is_given_up() {
        Ok(Outcome::Unknown { order: Some(id) })
    } else {
        Err(Error::OrderUndecided { order: id })
    }
}
