//! What the service counts besides its calls.

use std::{future::Future, sync::LazyLock};

use platform::grpc::{registered, seconds_buckets};
use prometheus::{Gauge, Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts};
use tokio::time::Instant;

use crate::{purchase::Outcome, store::recovery::Backlog};

/// Registered at first use, once a process.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// The service's own metrics.
pub struct Metrics {
    product_cache: IntCounterVec,
    product_wait: Histogram,
    purchases_closed: IntCounterVec,
    purchases_open: IntGauge,
    purchases_oldest: Gauge,
}

impl Metrics {
    fn new() -> Self {
        let opts = |name: &str, help: &str| Opts::new(format!("checkout_{name}"), help);
        let wait = HistogramOpts::new(
            "checkout_product_wait_seconds",
            "Time in line for a request to ProductService.",
        );
        Self {
            product_cache: registered(IntCounterVec::new(
                opts(
                    "counter_product_lookups_total",
                    "Names and prices needed: hit in the cache, shared with another caller, or missed.",
                ),
                &["result"],
            )),
            product_wait: registered(Histogram::with_opts(wait.buckets(seconds_buckets()))),
            purchases_closed: purchases_closed(),
            purchases_open: registered(IntGauge::with_opts(opts(
                "gauge_purchases_open",
                "Purchases whose outcome is not known yet.",
            ))),
            purchases_oldest: registered(Gauge::with_opts(opts(
                "gauge_purchases_oldest_seconds",
                "Age of the oldest open purchase.",
            ))),
        }
    }

    /// How a product was found: `hit`, `shared` or `miss`.
    pub fn product_cache(&self, result: &'static str) {
        self.product_cache.with_label_values(&[result]).inc();
    }

    /// Measures the wait for a slot; a wait that was given up counts too.
    pub async fn product_wait<T>(&self, wait: impl Future<Output = T>) -> T {
        let _timer = Waited(&self.product_wait, Instant::now());
        wait.await
    }

    /// A purchase ended.
    pub fn purchase_closed(&self, outcome: &Outcome) {
        self.purchases_closed
            .with_label_values(&[outcome.name()])
            .inc();
    }

    /// What is open now.
    pub fn backlog(&self, backlog: &Backlog) {
        self.purchases_open.set(backlog.open);
        self.purchases_oldest.set(backlog.oldest_seconds);
    }
}

fn purchases_closed() -> IntCounterVec {
    let opts = Opts::new(
        "checkout_counter_purchases_closed_total",
        "Purchases that ended, by outcome.",
    );
    let closed = registered(IntCounterVec::new(opts, &["outcome"]));
    // a counter that is not there cannot be seen to begin
    for outcome in Outcome::NAMES {
        closed.with_label_values(&[outcome]);
    }
    closed
}

struct Waited<'a>(&'a Histogram, Instant);

impl Drop for Waited<'_> {
    fn drop(&mut self) {
        self.0.observe(self.1.elapsed().as_secs_f64());
    }
}
