//! CreateOrder. Every order waits for a flush of the log and for the rows it shares with others, so orders are placed
//! many at a time: handlers queue, one placer takes what is waiting and writes it in one transaction. It never waits for
//! more: an idle system answers one order as fast as it can.

use std::{collections::BTreeSet, panic::AssertUnwindSafe, sync::LazyLock, time::Duration};

use futures::FutureExt as _;
use platform::{
    grpc::{Deadline, registered},
    pg::{self, Db, Failure, Pool},
    state_log::StateLog,
    tasks::Tasks,
    telemetry,
};
use prometheus::{Histogram, HistogramOpts, IntGauge};
use tokio::sync::{
    mpsc::{self, error::TrySendError},
    oneshot,
};
use tracing::{Instrument as _, Span};

use crate::{
    batch::{Answer, NewOrder, OrderIds, Placed, place_batch},
    config::OrdersConfig,
    crash::CrashPoint,
    error::Error,
    order::{Sku, Status},
    orders::{count_transition, show_metrics},
    outbox::Relay,
    store::placement as store,
};

struct Waiting {
    order: NewOrder,
    deadline: Deadline,
    reply: oneshot::Sender<Result<Placed, Error>>,
}

impl Waiting {
    /// Itself, if somebody still waits for it; else it is dropped before it costs.
    fn in_time(self) -> Option<Waiting> {
        if self.deadline.passed() {
            self.reply.send(Err(Error::Late)).ok();
            None
        } else {
            (!self.reply.is_closed()).then_some(self)
        }
    }
}

fn skus(batch: &[Waiting]) -> BTreeSet<Sku> {
    let lines = batch.iter().flat_map(|waiting| waiting.order.lines.iter());
    lines.map(|(sku, _)| sku).collect()
}

/// The way into the placer's queue.
#[derive(Clone)]
pub(crate) struct Placements(mpsc::Sender<Waiting>);

impl Placements {
    /// Starts the placer, which has a connection of its own, and returns the way in.
    pub(crate) fn start(db: Pool, config: OrdersConfig, relay: Relay, tasks: &Tasks) -> Placements {
        LazyLock::force(&METRICS);
        show_metrics();
        let (sender, queue) = mpsc::channel(config.queue.max(1));
        let stopping = tasks.stopping();
        let mut placer = Placer {
            db,
            config,
            relay,
            queue,
            carried: None,
            held: BTreeSet::new(),
            ids: OrderIds::default(),
        };
        tasks.worker_thread("placer", async move {
            tokio::select! {
                () = placer.run() => {}
                () = stopping.cancelled() => {}
            }
            Ok(())
        });
        Placements(sender)
    }

    /// Places an order, or makes it `failed` when stock is short: both are answers, not errors.
    #[tracing::instrument(name = "placement", skip_all, fields(user.id = order.user.get(), order.id))]
    pub(crate) async fn place(&self, order: NewOrder, deadline: Deadline) -> Result<Placed, Error> {
        let (reply, answer) = oneshot::channel();
        self.0
            .try_send(Waiting {
                order,
                deadline,
                reply,
            })
            .map_err(|refused| match refused {
                TrySendError::Full(_) => Error::Busy,
                TrySendError::Closed(_) => Error::Stopping,
            })?;
        METRICS
            .queue
            .set((self.0.max_capacity() - self.0.capacity()) as i64);
        // the placer is gone only when the process stops
        let placed = answer.await.unwrap_or(Err(Error::Stopping))?;
        tracing::Span::current().record("order.id", placed.order.0);
        Ok(placed)
    }
}

struct Placer {
    db: Pool,
    config: OrdersConfig,
    relay: Relay,
    queue: mpsc::Receiver<Waiting>,
    /// The order that did not fit into the last batch.
    carried: Option<Waiting>,
    /// What somebody sat on when it was last looked at.
    held: BTreeSet<Sku>,
    ids: OrderIds,
}

static BATCHES: StateLog = StateLog::new("batch failed", "orders are placed again");
static HELD: StateLog = StateLog::new(
    "stock is held, orders are refused",
    "no order is refused for held stock",
);

impl Placer {
    async fn run(&mut self) {
        while let Some(batch) = self.next_batch().await {
            self.place(batch).await;
        }
    }

    /// What is waiting, up to the bounds. Orders that nobody waits for any more are dropped here, before they cost.
    async fn next_batch(&mut self) -> Option<Vec<Waiting>> {
        let mut next = match self.carried.take() {
            Some(waiting) => Some(waiting),
            None => Some(self.queue.recv().await?),
        };
        let (mut batch, mut lines) = (Vec::new(), 0);
        while let Some(waiting) = next {
            if let Some(waiting) = waiting.in_time() {
                lines += waiting.order.lines.len();
                if !batch.is_empty() && lines > self.config.batch_lines {
                    self.carried = Some(waiting);
                    break;
                }
                batch.push(waiting);
            }
            next = if batch.len() < self.config.batch_orders {
                self.queue.try_recv().ok()
            } else {
                None
            };
        }
        METRICS.queue.set(self.queue.len() as i64);
        Some(batch)
    }

    /// Places a batch; one that has waited in vain for a row of stock, once more without those who want what is held.
    async fn place(&mut self, batch: Vec<Waiting>) {
        let suspects = std::mem::take(&mut self.held);
        let batch = self.turn_away(suspects, batch).await;
        let Some(batch) = self.try_place(batch).await else {
            return;
        };
        let (all, suspects) = (batch.len(), skus(&batch));
        let batch = self.turn_away(suspects, batch).await;
        // nobody holds stock: what it has waited for was something else, or is free by now
        let again = batch.len() < all;
        let batch = if again {
            self.try_place(batch).await
        } else {
            Some(batch)
        };
        for waiting in batch.into_iter().flatten() {
            let locked = Error::BatchFailed(Failure::Locked);
            waiting.reply.send(Err(locked)).ok();
        }
    }

    /// Answers those who want SKUs that somebody sits on, of `suspects`, and those who are late by now; returns the others.
    /// Everybody in a batch waits for the rows of all: who wants what is held must not be in it.
    async fn turn_away(&mut self, suspects: BTreeSet<Sku>, batch: Vec<Waiting>) -> Vec<Waiting> {
        if suspects.is_empty() {
            return batch;
        }
        let suspects: Vec<Sku> = suspects.into_iter().collect();
        let look = async |db: &mut Db| store::find_held_skus(db, &suspects).await;
        match self.db.repeatable(look).await {
            Ok(held) => self.held = held,
            // the batch has failed before it, and said so
            Err(error) => BATCHES.failed(&error),
        }
        let wants_held = |waiting: &Waiting| {
            let mut skus = waiting.order.lines.iter().map(|(sku, _)| sku);
            skus.any(|sku| self.held.contains(&sku))
        };
        let (away, rest): (Vec<_>, Vec<_>) = batch.into_iter().partition(wants_held);
        if !away.is_empty() {
            let (skus, orders) = (self.held.len(), away.len());
            HELD.failed(&format_args!("{skus} SKUs locked, {orders} orders refused"));
        }
        for waiting in away {
            waiting.reply.send(Err(Error::StockLocked)).ok();
        }
        rest.into_iter().filter_map(Waiting::in_time).collect()
    }

    /// Places and answers. The batch comes back if it has waited in vain for a row: nothing is written then.
    async fn try_place(&mut self, batch: Vec<Waiting>) -> Option<Vec<Waiting>> {
        if batch.is_empty() {
            return None;
        }
        METRICS.batch.observe(batch.len() as f64);
        let (orders, callers): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .map(|waiting| (waiting.order, (waiting.deadline, waiting.reply)))
            .unzip();
        let span = batch_span(&orders);
        let answers = match AssertUnwindSafe(self.place_orders(&orders).instrument(span))
            .catch_unwind()
            .await
        {
            Ok(Some(answers)) => answers,
            Ok(None) => {
                let batch = orders.into_iter().zip(callers);
                let batch = batch.map(|(order, (deadline, reply))| Waiting {
                    order,
                    deadline,
                    reply,
                });
                return Some(batch.collect());
            }
            Err(_) => orders.iter().map(|_| Err(Error::Broken)).collect(),
        };
        self.relay.wake();
        for ((_, reply), answer) in callers.into_iter().zip(answers) {
            reply.send(answer).ok();
        }
        None
    }

    /// An answer each. `None`: the batch has waited in vain for a row.
    async fn place_orders(&mut self, orders: &[NewOrder]) -> Option<Vec<Result<Placed, Error>>> {
        let mut outcome = self.place_together(orders).await;
        if outcome
            .as_ref()
            .is_err_and(|error| error.failure() == Failure::Conflict)
        {
            outcome = self.place_together(orders).await;
        }
        let error = match outcome {
            Ok(answers) => {
                BATCHES.works();
                HELD.works();
                return Some(answers);
            }
            Err(error) => error,
        };
        if error.failure().passes() {
            BATCHES.failed(&error);
        } else {
            error.log();
        }
        let answers = match error.failure() {
            Failure::Locked => return None,
            // one order hurts a constraint, or meets rows that are wrong: alone it hurts only itself
            Failure::Refused | Failure::Invariant if orders.len() > 1 => {
                let mut answers = Vec::with_capacity(orders.len());
                for order in orders {
                    answers.extend(
                        match self.place_together(std::slice::from_ref(order)).await {
                            Ok(answers) => answers,
                            Err(error) => vec![Err(Error::Database(error))],
                        },
                    );
                }
                answers
            }
            // after a lost commit its fate is unknown: only a key makes a retry safe, and that is the caller's
            failure => orders
                .iter()
                .map(|_| Err(Error::BatchFailed(failure)))
                .collect(),
        };
        Some(answers)
    }

    async fn place_together(
        &mut self,
        orders: &[NewOrder],
    ) -> pg::Result<Vec<Result<Placed, Error>>> {
        let (ids, payment_timeout) = (&mut self.ids, self.config.payment_timeout);
        for _ in 0..SWEPT_ROUNDS {
            let write = async |db: &mut Db| write(db, orders, ids, payment_timeout).await;
            let written = self.db.with_connection(write).await;
            if written.is_err() {
                ids.forget();
            }
            let Some(answers) = written? else {
                continue;
            };
            for (winner, answer) in &answers {
                if let (true, Ok(placed)) = (winner, answer) {
                    count_transition(Status::New, 1);
                    count_transition(placed.status, 1);
                }
            }
            return Ok(answers.into_iter().map(|(_, answer)| answer).collect());
        }
        Err(pg::Error::conflict("keys were swept each time"))
    }
}

/// The span of a batch, which belongs to no one order's trace: it links to the calls that it serves.
fn batch_span(orders: &[NewOrder]) -> Span {
    let span = tracing::info_span!("placement.batch", batch.size = orders.len());
    let calls = orders
        .iter()
        .filter_map(|order| order.traceparent.as_deref());
    telemetry::link_to_calls(&span, calls);
    span
}

/// How often a batch is begun again because a key was swept while it was claimed; once is already unlikely.
const SWEPT_ROUNDS: usize = 3;

/// The transaction of a batch. `None`: nothing is written, it may be begun again.
async fn write(
    db: &mut Db,
    orders: &[NewOrder],
    ids: &mut OrderIds,
    payment_timeout: Duration,
) -> pg::Result<Option<Vec<Answer>>> {
    let mut tx = db.begin().await?;
    let Some(answers) = place_batch(&mut tx, orders, ids, payment_timeout).await? else {
        tx.rollback().await?;
        return Ok(None);
    };
    CrashPoint::OrderPlacing.pass();
    tx.commit().await?;
    CrashPoint::OrderPlaced.pass();
    Ok(Some(answers))
}

struct Metrics {
    batch: Histogram,
    queue: IntGauge,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| Metrics {
    batch: registered(Histogram::with_opts(
        HistogramOpts::new(
            "loms_placement_batch_orders",
            "Orders placed by one transaction.",
        )
        .buckets(vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]),
    )),
    queue: registered(IntGauge::new(
        "loms_placement_queue_orders",
        "Orders that wait for the placer.",
    )),
});
