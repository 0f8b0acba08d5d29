//! The purchase, a small saga that survives a crash at any point: the lines move into a purchase row, LOMS is asked with
//! the row's id as the key, the row is closed. What stays open is finished by the user's next call or by the worker.
//!
//! ```text
//!   begin ──────────► ask LOMS ─────────► close            each step leaves what the next caller needs;
//!   (cart's lock)     (no lock held)      (cart's lock)    LOMS gives the same order for the same key
//! ```

use std::time::Duration;

use fail::fail_point;
use platform::{
    grpc::Deadline,
    pg::{self, Db, Pool},
    state_log::StateLog,
    tasks::Tasks,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    cart::UserId,
    clients::loms::Loms,
    config::PurchasesConfig,
    error::Error,
    metrics::METRICS,
    purchase::{self, IdempotencyKey, OpenPurchase, OrderId, Outcome, Start},
    sending::{Sender, Sending},
    store::{
        self,
        purchases::{Loaded, SentMark},
    },
};

static NOT_NOTED: StateLog = StateLog::new(
    "whether the outcome is told was not noted",
    "whether outcomes are told is noted again",
);
static NOT_POSTPONED: StateLog =
    StateLog::new("purchase not postponed", "purchases are postponed again");

/// The use case; clones share everything.
#[derive(Clone)]
pub struct Purchases {
    pool: Pool,
    sender: Sender,
    tasks: Tasks,
    config: PurchasesConfig,
}

/// For whom a purchase is driven, and how long it may take.
pub struct Driver {
    deadline: Deadline,
    /// `None` for the worker, to whom an outcome is not news.
    caller_left: Option<CancellationToken>,
}

/// What a call is about.
enum Begun {
    /// The purchase that it begins.
    New(Uuid, SentMark),
    /// The purchase that it is answered from.
    Ours(Uuid),
    /// One with another key, which has to end before the call's own may begin.
    Before(Uuid),
}

impl Driver {
    /// Nobody waits for the outcome.
    pub fn worker(allowed: Duration) -> Self {
        Self {
            deadline: Deadline::after(allowed),
            caller_left: None,
        }
    }

    /// An outcome that is known now still reaches its caller, as far as that can be known.
    fn hears(&self) -> bool {
        let left = self
            .caller_left
            .as_ref()
            .map(CancellationToken::is_cancelled);
        left == Some(false) && !self.deadline.passed()
    }
}

impl Purchases {
    /// Purchases are in `pool`; `tasks` carries what a caller began and left.
    pub fn new(pool: Pool, loms: Loms, tasks: Tasks, config: PurchasesConfig) -> Self {
        Self {
            sender: Sender::new(pool.clone(), loms),
            pool,
            tasks,
            config,
        }
    }

    /// Orders what is in the cart, or finds out how an earlier call's purchase ended.
    ///
    /// # Errors
    /// EMPTY_CART, INSUFFICIENT_STOCK, ORDER_CANCELLED, ORDER_REFUSED: it is over, and the lines are in the cart. LOMS or
    /// the database away or late: it stays open, and is finished by the next call or by the worker.
    pub async fn purchase(
        &self,
        user: UserId,
        key: Option<IdempotencyKey>,
        deadline: Deadline,
    ) -> Result<OrderId, Error> {
        let left = CancellationToken::new();
        // dropped with this call: when its answer is given, or when its caller has gone
        let _present = left.clone().drop_guard();
        let driver = Driver {
            deadline,
            caller_left: Some(left),
        };
        let this = self.clone();
        self.tasks
            .run("purchase", async move {
                this.run(user, key.as_ref(), &driver).await
            })
            .await?
    }

    async fn run(
        &self,
        user: UserId,
        key: Option<&IdempotencyKey>,
        driver: &Driver,
    ) -> Result<OrderId, Error> {
        loop {
            match self.begin(user, key, driver.deadline).await? {
                Begun::New(id, mark) => {
                    let sending = Sending::begun(mark);
                    return answer(self.finish_sending(id, driver, &sending).await?);
                }
                Begun::Ours(id) => return answer(self.finish(id, driver).await?),
                Begun::Before(id) => {
                    let silent = Driver {
                        deadline: driver.deadline,
                        caller_left: None,
                    };
                    self.finish(id, &silent).await?;
                }
            }
            if driver.deadline.passed() {
                return Err(Error::Late {
                    waited_for: "the purchase before this one",
                });
            }
        }
    }

    /// Decides under the cart's lock what this call is about, and writes it down before LOMS hears of it.
    async fn begin(
        &self,
        user: UserId,
        key: Option<&IdempotencyKey>,
        deadline: Deadline,
    ) -> Result<Begun, Error> {
        let decide = async |db: &mut Db| self.decide(db, user, key, deadline).await;
        let begun = self.pool.with_row(user.get(), decide).await?;
        fail_point!("purchase-begun", |_| std::process::abort());
        Ok(begun)
    }

    async fn decide(
        &self,
        db: &mut Db,
        user: UserId,
        key: Option<&IdempotencyKey>,
        deadline: Deadline,
    ) -> Result<Begun, Error> {
        Error::unless_in_time(deadline)?;
        let mut tx = db.begin().await?;
        let Some(cart_id) = store::carts::lock_cart(&mut tx, user).await? else {
            return Err(Error::EmptyCart);
        };
        // the lock may have been the longest wait of all
        Error::unless_in_time(deadline)?;
        if let Some(key) = key
            && let Some(known) = store::purchases::find_by_key(&mut tx, cart_id, key).await?
        {
            return Ok(Begun::Ours(known));
        }
        let last = store::purchases::find_last(&mut tx, cart_id).await?;
        let empty = store::carts::is_empty(&mut tx, cart_id).await?;
        let begun = match purchase::start(last, key.is_some(), empty) {
            Start::Empty => return Err(Error::EmptyCart),
            Start::Begin => {
                let resume_after = self.config.resume_after;
                let (id, mark) =
                    store::purchases::insert_purchase(&mut tx, cart_id, key, resume_after).await?;
                store::carts::move_lines_out(&mut tx, cart_id, id).await?;
                Begun::New(id, mark)
            }
            Start::Answer(id) => {
                if let Some(key) = key {
                    store::purchases::adopt_key(&mut tx, id, key).await?;
                }
                Begun::Ours(id)
            }
            Start::FinishFirst(id) => Begun::Before(id),
        };
        tx.commit().await?;
        Ok(begun)
    }

    /// Brings a purchase to its end, or says how it ended. Any number may do so at once: LOMS gives them the same order,
    /// and one of them closes the row.
    ///
    /// # Errors
    /// It stays open, to be tried again later.
    pub async fn finish(&self, id: Uuid, driver: &Driver) -> Result<Outcome, Error> {
        self.finish_sending(id, driver, &Sending::default()).await
    }

    async fn finish_sending(
        &self,
        id: Uuid,
        driver: &Driver,
        sending: &Sending,
    ) -> Result<Outcome, Error> {
        let mut attempts = 0;
        let ended = self.drive(id, driver, sending, &mut attempts).await;
        let unsent = sending.unsent();
        match (&ended, &driver.caller_left) {
            (Ok(_), _) => {}
            // the database is in trouble, and the caller's answer does not wait for it twice
            (Err(Error::Database(_)), Some(_)) => {
                let this = self.clone();
                self.tasks
                    .detach(async move { this.postpone(id, attempts, unsent).await });
            }
            (Err(_), _) => self.postpone(id, attempts, unsent).await,
        }
        ended
    }

    async fn drive(
        &self,
        id: Uuid,
        driver: &Driver,
        sending: &Sending,
        attempts: &mut u32,
    ) -> Result<Outcome, Error> {
        loop {
            let purchase = match self.load(id).await? {
                Some(Loaded::Closed { outcome, told }) => {
                    if !told {
                        self.tell(id, driver).await;
                    }
                    return Ok(outcome);
                }
                Some(Loaded::Open { purchase, stale }) if purchase.resolving || !stale => purchase,
                Some(Loaded::Open { .. }) => {
                    // written down before anything is cancelled: a young caller's answer must not close it as made now
                    let mark = async |db: &mut Db| store::purchases::mark_resolving(db, id).await;
                    self.pool.repeatable(mark).await?;
                    continue;
                }
                None => return Err(Error::PurchaseGone),
            };
            *attempts = purchase.attempts;
            let asked = self.sender.ask(&purchase, sending, driver.deadline).await;
            if let Err(Error::OrderOutcomePending) = asked
                && let Some(Loaded::Closed { .. }) = self.load(id).await?
            {
                continue;
            }
            let outcome = asked?;
            if self.close(&purchase, &outcome, driver).await? {
                return Ok(outcome);
            }
        }
    }

    async fn load(&self, id: Uuid) -> Result<Option<Loaded>, Error> {
        let resolve_after = self.config.resolve_after;
        let load = async |db: &mut Db| store::purchases::load_purchase(db, id, resolve_after).await;
        Ok(self.pool.repeatable(load).await?)
    }

    /// Closes the purchase, unless somebody was quicker or it began to be resolved meanwhile. The cart is locked before
    /// the purchase, as everywhere; only the one who closes moves lines.
    async fn close(
        &self,
        purchase: &OpenPurchase,
        outcome: &Outcome,
        driver: &Driver,
    ) -> Result<bool, Error> {
        fail_point!("purchase-closing", |_| std::process::abort());
        let resolve_after = self.config.resolve_after;
        let write = async |db: &mut Db| write_close(db, purchase, outcome, resolve_after).await;
        if !self.pool.with_row(purchase.user.get(), write).await? {
            return Ok(false);
        }
        fail_point!("purchase-closed", |_| std::process::abort());
        METRICS.purchase_closed(outcome);
        match outcome {
            Outcome::Refused { reason } => {
                tracing::error!(purchase.id = %purchase.id, reason, "order refused by loms");
            }
            Outcome::Unknown { order } => {
                let order = order.map(|order| order.0);
                tracing::error!(purchase.id = %purchase.id, user.id = purchase.user.get(), order.id = order,
                    "outcome of a purchase is unknown, an order may exist");
            }
            Outcome::Made { .. } | Outcome::Failed { .. } | Outcome::Cancelled { .. } => {}
        }
        self.tell(purchase.id, driver).await;
        Ok(true)
    }

    /// Writes down that the caller hears the outcome, after it is settled and before it is said: should we die in between,
    /// it is said again rather than never. A caller who went meanwhile has not heard it: his next call is told.
    async fn tell(&self, id: Uuid, driver: &Driver) {
        for told in [true, false] {
            if driver.hears() != told {
                return;
            }
            let mark = async |db: &mut Db| store::purchases::mark_told(db, id, told).await;
            if let Err(error) = self.pool.repeatable(mark).await {
                NOT_NOTED.failed(&format_args!("purchase {id}: {error}"));
                return;
            }
        }
    }

    /// A purchase that cannot even be put off is due again when its lease ends, so a failure here is only noted.
    async fn postpone(&self, id: Uuid, attempts: u32, unsent: Option<SentMark>) {
        let (first, most) = (self.config.first_backoff, self.config.most_backoff);
        let wait = purchase::backoff(attempts, first, most, rand::random());
        let postpone = async |db: &mut Db| store::recovery::postpone(db, id, wait, unsent).await;
        if let Err(error) = self.pool.repeatable(postpone).await {
            NOT_POSTPONED.failed(&format_args!("purchase {id}: {error}"));
        }
    }
}

/// The transaction of [`Purchases::close`]; whether it closed the purchase.
async fn write_close(
    db: &mut Db,
    purchase: &OpenPurchase,
    outcome: &Outcome,
    resolve_after: Duration,
) -> pg::Result<bool> {
    let mut tx = db.begin().await?;
    store::carts::lock_cart(&mut tx, purchase.user).await?;
    let closed =
        store::purchases::close_purchase(&mut tx, purchase, outcome, resolve_after).await?;
    if !closed {
        return Ok(false);
    }
    match outcome {
        Outcome::Made { .. } => {}
        Outcome::Failed { .. }
        | Outcome::Cancelled { .. }
        | Outcome::Refused { .. }
        | Outcome::Unknown { .. } => {
            store::carts::give_lines_back(&mut tx, purchase.cart_id, purchase.id).await?;
        }
    }
    tx.commit().await?;
    Ok(true)
}

/// What the caller hears of an outcome.
fn answer(outcome: Outcome) -> Result<OrderId, Error> {
    match outcome {
        Outcome::Made { order } => Ok(order),
        Outcome::Failed { order, shortages } => Err(Error::OrderFailed { order, shortages }),
        Outcome::Cancelled { order } => Err(Error::OrderCancelled { order }),
        Outcome::Refused { .. } => Err(Error::OrderRefused),
        Outcome::Unknown { order } => Err(Error::OrderOutcomeUnknown { order }),
    }
}
