//! Messages on their way. Each is tried by itself and is written down when it lands, so that one that is slow holds nobody up;
//! of an order there is one at a time.

use std::{collections::HashSet, future::Future, sync::Arc};

use fail::fail_point;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use platform::telemetry;
use tracing::Instrument as _;

use crate::{
    config::DeliveryConfig,
    message::Due,
    telegram::Channel,
    verdict::{Verdict, judge, overdue},
};

/// Messages at once when they only go to the log: one transaction writes them down, and a crash before it repeats as many.
const LOG_BATCH: u32 = 100;

/// A message, and what came of it.
pub type Landed = (Due, Verdict);

/// What is on its way, and what has landed and is not taken yet.
pub struct Flights {
    channel: Channel,
    config: Arc<DeliveryConfig>,
    flying: FuturesUnordered<BoxFuture<'static, Vec<Landed>>>,
    landed: Vec<Landed>,
    /// Of both.
    orders: HashSet<i64>,
}

impl Flights {
    /// None yet.
    pub fn new(channel: Channel, config: DeliveryConfig) -> Flights {
        Flights {
            channel,
            config: Arc::new(config),
            flying: FuturesUnordered::new(),
            landed: Vec::new(),
            orders: HashSet::new(),
        }
    }

    /// How many there are at most.
    pub fn limit(&self) -> u32 {
        match self.channel {
            Channel::Telegram(_) => self.config.in_flight,
            Channel::Log => LOG_BATCH,
        }
    }

    /// How many more there may be now.
    pub fn room(&self) -> usize {
        (self.limit() as usize).saturating_sub(self.orders.len())
    }

    /// Sends messages on their way, of which no two are of one order or of one that is here already.
    pub fn launch(&mut self, due: Vec<Due>) {
        self.orders.extend(due.iter().map(|due| due.order));
        let flights: Vec<Vec<Due>> = match self.channel {
            Channel::Telegram(_) => due.into_iter().map(|due| vec![due]).collect(),
            // lines are written one after another anyway
            Channel::Log => vec![due],
        };
        for due in flights {
            let flight = fly(self.channel.clone(), self.config.clone(), due);
            self.flying.push(flight.boxed());
        }
    }

    /// Waits until one lands, for ever if none is on its way; others that have landed by then are noted with it. May be
    /// dropped in the middle.
    pub async fn land(&mut self) {
        match self.flying.next().await {
            Some(landed) => self.landed.extend(landed),
            None => std::future::pending().await,
        }
        while let Some(Some(landed)) = self.flying.next().now_or_never() {
            self.landed.extend(landed);
        }
    }

    /// Waits until all have landed; the bound of one attempt is the bound of that.
    pub async fn land_all(&mut self) {
        while !self.flying.is_empty() {
            self.land().await;
        }
    }

    /// Does something else meanwhile: an answer that nobody looks at in time would count as none.
    pub async fn during<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = std::pin::pin!(other);
        loop {
            tokio::select! {
                done = &mut other => return done,
                () = self.land() => {}
            }
        }
    }

    /// What has landed since this was last asked.
    pub fn take_landed(&mut self) -> Vec<Landed> {
        let landed = std::mem::take(&mut self.landed);
        for (due, _) in &landed {
            self.orders.remove(&due.order);
        }
        landed
    }

    /// Whether a message of that order is on its way, or has landed and is not taken yet.
    pub fn has(&self, order: i64) -> bool {
        self.orders.contains(&order)
    }

    /// Whether one that has landed says that everybody is to wait.
    pub fn asked_to_wait(&self) -> bool {
        let paused = |(_, verdict): &Landed| matches!(verdict, Verdict::Paused(_));
        self.landed.iter().any(paused)
    }
}

async fn fly(channel: Channel, config: Arc<DeliveryConfig>, due: Vec<Due>) -> Vec<Landed> {
    let mut landed = Vec::with_capacity(due.len());
    for due in due {
        let verdict = attempt(&channel, &config, &due).await;
        landed.push((due, verdict));
    }
    landed
}

async fn attempt(channel: &Channel, config: &DeliveryConfig, due: &Due) -> Verdict {
    let span = tracing::info_span!("delivery.tell", order.id = due.order);
    if let Some(traceparent) = &due.traceparent {
        // one message is about one order: whoever follows that order's trace finds what became of it
        telemetry::set_parent(&span, traceparent);
    }
    let attempt = async {
        if due.overdue {
            return log(due, overdue(due, config.give_up_after));
        }
        let outcome = channel.tell(&due.text()).await;
        fail_point!("message-sent", |_| std::process::abort());
        log(due, judge(due, outcome, config))
    };
    attempt.instrument(span).await
}

fn log(due: &Due, verdict: Verdict) -> Verdict {
    match &verdict {
        Verdict::Again { error, .. } => {
            tracing::info!(order.id = due.order, attempts = due.attempts + 1, error = %error, "message not told yet");
        }
        Verdict::GivenUp { attempts, reason } => {
            tracing::warn!(order.id = due.order, attempts, reason = %reason, "message given up");
        }
        Verdict::Told | Verdict::Paused(_) => {}
    }
    verdict
}
