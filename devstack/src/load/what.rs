//! What is put on the system, and how: the arguments of `devstack load`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    calls::Shape,
    measure::{Pace, Span},
    skus::Skus,
};

/// What is put on the system.
#[derive(Subcommand, Clone)]
pub enum What {
    /// CreateOrder
    Create(Plan),
    /// OrderPayed of orders made before
    Pay(Plan),
    /// Whole orders: made, then eight of ten payed, one cancelled, one left to expire
    Mixed(Plan),
    /// Stocks
    Stocks(Plan),
    /// ListOrder of orders made before
    ListOrder(Plan),
    /// Orders that fall due at once are swept while others are made
    Expiry(Plan),
    /// CreateOrder at ten times what a LOMS that is kept small can do: how much of that it still does
    Overload(Plan),
    /// The loads of LOMS one after the other with `--filled` orders in the tables, then again with `--replicas`
    Grown(Plan),
    /// Every path of LOMS, and the plan of each of its statements, with `--filled` orders in the tables
    Plans(Plan),
    /// Events that have gathered are carried to the broker
    Relay(Plan),
    /// ListCart of carts filled before, prices cached
    ListCart(Plan),
    /// Events that have gathered are saved, then histories are shown: a million messages of ten thousand users
    Events(Plan),
    /// The writes of create and of the relay by LOMS' own code, on the database alone: what create can be at most
    Ceiling(Plan),
}

impl What {
    pub(super) fn name(&self) -> &'static str {
        match self {
            What::Create(_) => "create",
            What::Pay(_) => "pay",
            What::Mixed(_) => "mixed",
            What::Stocks(_) => "stocks",
            What::ListOrder(_) => "list-order",
            What::Expiry(_) => "expiry",
            What::Overload(_) => "overload",
            What::Grown(_) => "grown",
            What::Plans(_) => "plans",
            What::Relay(_) => "relay",
            What::ListCart(_) => "list-cart",
            What::Events(_) => "events",
            What::Ceiling(_) => "ceiling",
        }
    }

    /// What runs: the service that is called first.
    pub(super) fn services(&self) -> &'static [&'static str] {
        match self {
            What::ListCart(_) => &["checkout", "loms"],
            What::Events(_) => &["notifications"],
            _ => &["loms"],
        }
    }

    /// What its calls are about.
    pub(super) fn subject(&self) -> String {
        let plan = self.plan();
        match self {
            What::Events(_) => format!("{} events", plan.prepared),
            What::ListCart(_) => format!("{} lines", plan.lines),
            _ if plan.filled > 0 => format!(
                "{} lines, {}, {} orders in the tables",
                plan.lines, plan.skus, plan.filled
            ),
            _ if plan.replicas > 1 => format!(
                "{} lines, {}, {} replicas",
                plan.lines, plan.skus, plan.replicas
            ),
            _ => format!("{} lines, {}", plan.lines, plan.skus),
        }
    }

    /// How it is done.
    pub fn plan(&self) -> &Plan {
        match self {
            What::Create(plan)
            | What::Pay(plan)
            | What::Mixed(plan)
            | What::Stocks(plan)
            | What::ListOrder(plan)
            | What::Expiry(plan)
            | What::Overload(plan)
            | What::Grown(plan)
            | What::Plans(plan)
            | What::Relay(plan)
            | What::ListCart(plan)
            | What::Events(plan)
            | What::Ceiling(plan) => plan,
        }
    }
}

/// How it is done.
#[derive(Args, Clone, Debug)]
pub struct Plan {
    /// Callers at once, each with its next call when it has an answer
    #[arg(long, default_value_t = 64)]
    pub(super) clients: usize,
    /// Calls a second on a schedule instead; an answer counts from when its call was due
    #[arg(long)]
    pub(super) rate: Option<f64>,
    /// Seconds that are measured
    #[arg(long, default_value_t = 10)]
    pub(super) seconds: u64,
    /// Seconds before that
    #[arg(long, default_value_t = 3)]
    pub(super) warmup: u64,
    /// Lines of an order
    #[arg(long, default_value_t = 3)]
    pub(super) lines: usize,
    /// uniform:N, zipf:EXPONENT:N, or hot:N (one of N in every order)
    #[arg(long, default_value = "uniform:1000")]
    pub(super) skus: Skus,
    /// A hundred units a warehouse instead of more than can be sold
    #[arg(long)]
    pub(super) scarce: bool,
    /// Without idempotency keys
    #[arg(long)]
    pub(super) no_keys: bool,
    /// Orders made before pay, list-order, expiry and relay
    #[arg(long, default_value_t = 100_000)]
    pub(super) prepared: usize,
    /// Payed orders in the tables before the load, written by SQL
    #[arg(long, default_value_t = 0)]
    pub(super) filled: i64,
    /// Processes of LOMS on the one database, each with its share of the callers; grown counts up to it
    #[arg(long, default_value_t = 1)]
    pub(super) replicas: usize,
    /// What the configuration of the service that is called says besides: --set orders.batch_orders=32
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = setting)]
    pub(super) settings: Vec<Setting>,
    /// Also say what each statement of LOMS cost PostgreSQL; with grown, the plan of each as `plans` does
    #[arg(long)]
    pub(super) statements: bool,
    /// Write the report here as JSON
    #[arg(long)]
    pub(super) json: Option<PathBuf>,
    /// A server that runs, host:port, instead of a stack of its own
    #[arg(long)]
    pub addr: Option<String>,
    /// What verifies its certificate; plaintext without
    #[arg(long, requires = "addr")]
    pub(super) ca: Option<PathBuf>,
    /// Start the services as they are, without `cargo build`
    #[arg(long)]
    pub no_build: bool,
}

impl Plan {
    pub(super) fn pace(&self) -> Pace {
        match self.rate {
            Some(rate) => Pace::Open {
                rate,
                // what is admitted at once anyway; a call beyond waits, and its wait counts
                clients: self.clients.max(512),
            },
            None => Pace::Closed {
                clients: self.clients,
            },
        }
    }

    pub(super) fn span(&self) -> Span {
        Span {
            warmup: Duration::from_secs(self.warmup),
            measured: Duration::from_secs(self.seconds),
        }
    }

    pub(super) fn shape(&self) -> Shape {
        Shape {
            skus: self.skus.clone(),
            lines: self.lines,
            keys: !self.no_keys,
            run: uuid::Uuid::new_v4().simple().to_string()[..8].to_owned(),
        }
    }
}

/// A configuration that says one thing.
#[derive(Clone, Debug)]
pub(super) struct Setting(pub(super) Value);

/// Reads `orders.batch_orders=32`.
fn setting(text: &str) -> Result<Setting, String> {
    let (path, value) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not KEY=VALUE"))?;
    let value: Value = serde_yaml::from_str(value).map_err(|error| error.to_string())?;
    let around = |inner: Value, key: &str| json!({ key: inner });
    Ok(Setting(path.split('.').rev().fold(value, around)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_a_configuration() {
        let Setting(read) = setting("orders.batch_orders=32").unwrap();
        assert_eq!(read, json!({"orders": {"batch_orders": 32}}));
        assert!(setting("orders").is_err());
    }
}
