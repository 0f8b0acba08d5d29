//! OrderPayed. A payment changes rows of its own order and appends others, so payments that wait at the same moment share
//! one transaction and one flush of the log. Whatever could keep it waiting stays out of it: an order that somebody else
//! has locked is payed by a transaction of its own.

use std::{
    collections::{BTreeMap, HashSet},
    panic::AssertUnwindSafe,
    sync::LazyLock,
};

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
    config::OrdersConfig,
    crash::CrashPoint,
    error::Error,
    order::{Event, OrderId, Status},
    orders::{self, Change, count_transition, settle},
    outbox::Relay,
    store::orders as store,
};

struct Waiting {
    payment: Change,
    deadline: Deadline,
    reply: oneshot::Sender<Verdict>,
}

/// What the batch says of a payment.
enum Verdict {
    Answer(Result<(), Error>),
    /// Nothing was written: it has to be payed by itself.
    Alone,
}

/// The way to pay an order.
#[derive(Clone)]
pub(crate) struct Payments {
    queue: mpsc::Sender<Waiting>,
    pool: Pool,
    relay: Relay,
    tasks: Tasks,
}

impl Payments {
    /// Starts the worker, which has the connection `db`; payments of their own transaction take one of `pool`.
    pub(crate) fn start(
        db: Pool,
        config: &OrdersConfig,
        pool: Pool,
        relay: Relay,
        tasks: &Tasks,
    ) -> Payments {
        LazyLock::force(&METRICS);
        let (sender, queue) = mpsc::channel(config.queue.max(1));
        let stopping = tasks.stopping();
        let mut payer = Payer {
            db,
            most: config.batch_orders.max(1),
            relay: relay.clone(),
            queue,
        };
        tasks.worker_thread("payments", async move {
            tokio::select! {
                () = payer.run() => {}
                () = stopping.cancelled() => {}
            }
            Ok(())
        });
        Payments {
            queue: sender,
            pool,
            relay,
            tasks: tasks.clone(),
        }
    }

    /// Payment has arrived: the reservation is written off. Again is no change.
    pub(crate) async fn pay(&self, order: OrderId, deadline: Deadline) -> Result<(), Error> {
        let payment = Change {
            order,
            traceparent: telemetry::traceparent(),
        };
        let (reply, verdict) = oneshot::channel();
        let waiting = Waiting {
            payment: payment.clone(),
            deadline,
            reply,
        };
        self.queue
            .try_send(waiting)
            .map_err(|refused| match refused {
                TrySendError::Full(_) => Error::Busy,
                TrySendError::Closed(_) => Error::Stopping,
            })?;
        METRICS
            .queue
            .set((self.queue.max_capacity() - self.queue.capacity()) as i64);
        match verdict.await {
            Ok(Verdict::Answer(answer)) => answer,
            Ok(Verdict::Alone) => {
                let (pool, relay) = (self.pool.clone(), self.relay.clone());
                let work = async move { orders::change(&pool, &relay, &payment, Event::Pay).await };
                let payed = self.tasks.run("pay", work).await;
                payed.map_err(|_| Error::Broken)?
            }
            // the worker is gone only when the process stops
            Err(_) => Err(Error::Stopping),
        }
    }
}

struct Payer {
    db: Pool,
    most: usize,
    relay: Relay,
    queue: mpsc::Receiver<Waiting>,
}

static BATCHES: StateLog = StateLog::new("batch of payments failed", "payments are written again");

impl Payer {
    /// Takes what is waiting, and never waits for more.
    async fn run(&mut self) {
        let mut batch = Vec::with_capacity(self.most);
        while self.queue.recv_many(&mut batch, self.most).await > 0 {
            METRICS.queue.set(self.queue.len() as i64);
            self.pay(batch.drain(..).filter_map(in_time).collect())
                .await;
        }
    }

    async fn pay(&mut self, batch: Vec<Waiting>) {
        if batch.is_empty() {
            return;
        }
        METRICS.batch.observe(batch.len() as f64);
        let (payments, replies): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .map(|waiting| (waiting.payment, waiting.reply))
            .unzip();
        let span = batch_span(&payments);
        let work = async |db: &mut Db| write(db, &payments).await;
        let written = AssertUnwindSafe(self.db.with_connection(work).instrument(span));
        let verdicts = match written.catch_unwind().await {
            Ok(Ok((verdicts, payed))) => {
                BATCHES.works();
                if payed > 0 {
                    count_transition(Status::Payed, payed);
                    self.relay.wake();
                }
                verdicts
            }
            Ok(Err(error)) => {
                if error.failure().passes() {
                    BATCHES.failed(&error);
                } else {
                    error.log();
                }
                let failure = error.failure();
                let verdict = |_: &Change| match failure {
                    // alone, a payment meets only its own trouble
                    Failure::Locked
                    | Failure::Conflict
                    | Failure::Refused
                    | Failure::Invariant
                    | Failure::Bug => Verdict::Alone,
                    // after a lost commit its fate is unknown; whoever pays again is told
                    Failure::NotConnected
                    | Failure::Exhausted
                    | Failure::Lost
                    | Failure::ReadOnly
                    | Failure::TimedOut => Verdict::Answer(Err(Error::BatchFailed(failure))),
                };
                payments.iter().map(verdict).collect()
            }
            Err(_) => {
                let broken = |_: &Change| Verdict::Answer(Err(Error::Broken));
                payments.iter().map(broken).collect()
            }
        };
        for (reply, verdict) in replies.into_iter().zip(verdicts) {
            reply.send(verdict).ok();
        }
    }
}

/// Itself, if somebody still waits for it; else it is dropped before it costs.
fn in_time(waiting: Waiting) -> Option<Waiting> {
    if waiting.deadline.passed() {
        waiting.reply.send(Verdict::Answer(Err(Error::Late))).ok();
        None
    } else {
        (!waiting.reply.is_closed()).then_some(waiting)
    }
}

/// The span of a batch, which belongs to no one order's trace: it links to the calls that it serves.
fn batch_span(payments: &[Change]) -> Span {
    let span = tracing::info_span!("payments.batch", batch.size = payments.len());
    let calls = payments
        .iter()
        .filter_map(|payment| payment.traceparent.as_deref());
    telemetry::link_to_calls(&span, calls);
    span
}

/// The transaction of a batch: a verdict for each payment, and how many orders came to be payed.
async fn write(db: &mut Db, payments: &[Change]) -> pg::Result<(Vec<Verdict>, u64)> {
    let mut tx = db.begin().await?;
    let asked: Vec<OrderId> = payments.iter().map(|payment| payment.order).collect();
    let free = store::lock_free_orders(&mut tx, &asked).await?;
    // one of those that pay the same order
    let awaiting: BTreeMap<OrderId, Change> = payments
        .iter()
        .filter(|payment| free.get(&payment.order) == Some(&Status::AwaitingPayment))
        .map(|payment| (payment.order, payment.clone()))
        .collect();
    let awaiting: Vec<Change> = awaiting.into_values().collect();
    let payed: HashSet<OrderId> = if awaiting.is_empty() {
        tx.rollback().await?;
        HashSet::new()
    } else {
        let payed = settle(&mut tx, &awaiting, Event::Pay).await?;
        CrashPoint::OrderSettling.pass();
        tx.commit().await?;
        CrashPoint::OrderSettled.pass();
        payed.into_iter().collect()
    };
    let verdict = |payment: &Change| {
        let order = payment.order;
        let Some(status) = free.get(&order) else {
            return Verdict::Alone;
        };
        Verdict::Answer(match status.apply(Event::Pay) {
            Ok(to) if to == *status || payed.contains(&order) => Ok(()),
            Ok(_) => Err(Error::PaymentLate(order)),
            Err(_) => Err(Error::Illegal {
                order,
                status: *status,
                event: Event::Pay,
            }),
        })
    };
    Ok((payments.iter().map(verdict).collect(), payed.len() as u64))
}

struct Metrics {
    batch: Histogram,
    queue: IntGauge,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| Metrics {
    batch: registered(Histogram::with_opts(
        HistogramOpts::new(
            "loms_payment_batch_orders",
            "Orders payed by one transaction.",
        )
        .buckets(vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]),
    )),
    queue: registered(IntGauge::new(
        "loms_payment_queue_orders",
        "Payments that wait for their turn.",
    )),
});
