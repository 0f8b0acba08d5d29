//! CreateOrder. Every order waits for a flush of the log and for the rows it shares with others, so orders are placed
//! many at a time: handlers queue, one placer takes what is waiting and writes it in one transaction. It never waits for
//! more: an idle system answers one order as fast as it can.

use std::{panic::AssertUnwindSafe, sync::LazyLock, time::Duration};

use futures::FutureExt as _;
use platform::{
    grpc::{Deadline, registered},
    pg::{self, Failure, OwnConnection},
    tasks::Tasks,
};
use prometheus::{Histogram, HistogramOpts, IntGauge};
use sqlx::{Connection as _, PgConnection};
use tokio::sync::{
    mpsc::{self, error::TrySendError},
    oneshot,
};

use crate::{
    batch::{NewOrder, Placed, place_batch},
    config::OrdersConfig,
    error::Error,
    order::Status,
    orders::count_transition,
    outbox::Relay,
};

struct Waiting {
    order: NewOrder,
    deadline: Deadline,
    reply: oneshot::Sender<Result<Placed, Error>>,
}

/// The way into the placer's queue.
#[derive(Clone)]
pub(crate) struct Placements(mpsc::Sender<Waiting>);

impl Placements {
    /// Starts the placer, which has a connection of its own, and returns the way in.
    pub(crate) fn start(
        db: OwnConnection,
        bound: Duration,
        config: OrdersConfig,
        relay: Relay,
        tasks: &Tasks,
    ) -> Placements {
        let (sender, queue) = mpsc::channel(config.queue.max(1));
        let stopping = tasks.stopping();
        let mut placer = Placer {
            db,
            bound,
            config,
            relay,
            queue,
            carried: None,
        };
        tasks.worker("placer", async move {
            tokio::select! {
                () = placer.run() => {}
                () = stopping.cancelled() => {}
            }
            Ok(())
        });
        Placements(sender)
    }

    /// Places an order, or makes it `failed` when stock is short: both are answers, not errors.
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
                TrySendError::Closed(_) => Error::Away,
            })?;
        METRICS
            .queue
            .set((self.0.max_capacity() - self.0.capacity()) as i64);
        // the placer is gone only when the process stops
        answer.await.unwrap_or(Err(Error::Away))
    }
}

struct Placer {
    db: OwnConnection,
    /// A transaction that takes longer has lost its server.
    bound: Duration,
    config: OrdersConfig,
    relay: Relay,
    queue: mpsc::Receiver<Waiting>,
    /// The order that did not fit into the last batch.
    carried: Option<Waiting>,
}

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
            if waiting.deadline.passed() {
                waiting.reply.send(Err(Error::Late)).ok();
            } else if !waiting.reply.is_closed() {
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

    async fn place(&mut self, batch: Vec<Waiting>) {
        if batch.is_empty() {
            return;
        }
        METRICS.batch.observe(batch.len() as f64);
        let (orders, replies): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .map(|waiting| (waiting.order, waiting.reply))
            .unzip();
        let answers = match AssertUnwindSafe(self.place_orders(&orders))
            .catch_unwind()
            .await
        {
            Ok(answers) => answers,
            Err(_) => orders.iter().map(|_| Err(Error::Broken)).collect(),
        };
        self.relay.wake();
        for (reply, answer) in replies.into_iter().zip(answers) {
            reply.send(answer).ok();
        }
    }

    async fn place_orders(&mut self, orders: &[NewOrder]) -> Vec<Result<Placed, Error>> {
        let mut outcome = self.place_together(orders).await;
        if outcome
            .as_ref()
            .is_err_and(|error| pg::classify(error) == Failure::Retry)
        {
            outcome = self.place_together(orders).await;
        }
        let error = match outcome {
            Ok(answers) => return answers,
            Err(error) => error,
        };
        tracing::error!(error = %error, orders = orders.len(), "batch failed");
        match pg::classify(&error) {
            // one order hurts a constraint: alone it hurts only itself
            Failure::Data if orders.len() > 1 => {
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
            // what became of the commit is unknown: only a key makes a retry safe, and that is the caller's
            Failure::Away | Failure::Retry => orders.iter().map(|_| Err(Error::Away)).collect(),
            Failure::Data | Failure::Bug => orders.iter().map(|_| Err(Error::Broken)).collect(),
        }
    }

    async fn place_together(
        &mut self,
        orders: &[NewOrder],
    ) -> sqlx::Result<Vec<Result<Placed, Error>>> {
        let payment_timeout = self.config.payment_timeout;
        let write = async |db: &mut PgConnection| {
            let mut tx = db.begin().await?;
            let answers = place_batch(&mut tx, orders, payment_timeout).await?;
            tx.commit().await?;
            Ok::<_, sqlx::Error>(answers)
        };
        let answers = self.db.round(self.bound, write).await?;
        for (winner, placed) in answers
            .iter()
            .filter_map(|(winner, answer)| Some((winner, answer.as_ref().ok()?)))
        {
            if *winner {
                count_transition(Status::New, 1);
                count_transition(placed.status, 1);
            }
        }
        Ok(answers.into_iter().map(|(_, answer)| answer).collect())
    }
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
