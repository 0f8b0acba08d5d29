//! What came out of a replay, in the shape of `expected.json` with the run's own figures added.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::Value;

use super::{Plan, Way, play::Tally, stock};
use crate::{retail::Folder, service::Finished};

/// The figures that describe the folder, the same whichever way it is played.
const FOLDER_FIGURES: [&str; 4] = ["orders", "lines", "skus", "repeated_sku_lines"];

/// Everything that a replay prints.
#[derive(Debug, Serialize)]
pub struct Outcome {
    orders: usize,
    lines: usize,
    skus: usize,
    repeated_sku_lines: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    through_the_cart: Option<ThroughTheCart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    straight_to_loms: Option<StraightToLoms>,
    concurrency: usize,
    seconds: f64,
    orders_per_second: f64,
    /// Carts, and orders, that are not what their shoppers put into them.
    wrong_carts: Vec<String>,
    audit: Audit,
}

#[derive(Debug, Serialize)]
struct ThroughTheCart {
    payed: u64,
    empty_carts: u64,
    refused_lines: u64,
    /// Purchases for which the stock had gone since AddToCart; never with one shopper.
    #[serde(skip_serializing_if = "is_zero")]
    failed: u64,
    units_sold: u64,
    stock_left: u64,
    stock_left_sha256: String,
}

#[derive(Debug, Serialize)]
struct StraightToLoms {
    payed: u64,
    failed: u64,
    #[serde(skip)]
    units_sold: u64,
    stock_left: u64,
    stock_left_sha256: String,
}

#[derive(Debug, Serialize)]
struct Audit {
    consistent: bool,
    report: Vec<String>,
}

impl Outcome {
    pub(super) fn new(
        plan: &Plan,
        folder: &Folder,
        tally: Tally,
        left: &BTreeMap<u32, u64>,
        seconds: f64,
        audit: &Finished,
    ) -> Outcome {
        let Tally {
            payed,
            failed,
            empty_carts,
            refused_lines,
            units_sold,
            wrong_carts,
        } = tally;
        let (stock_left, stock_left_sha256) = (left.values().sum(), stock::digest(left));
        let (mut through_the_cart, mut straight_to_loms) = (None, None);
        match plan.way {
            Way::Cart => {
                through_the_cart = Some(ThroughTheCart {
                    payed,
                    empty_carts,
                    refused_lines,
                    failed,
                    units_sold,
                    stock_left,
                    stock_left_sha256,
                });
            }
            Way::Loms => {
                straight_to_loms = Some(StraightToLoms {
                    payed,
                    failed,
                    units_sold,
                    stock_left,
                    stock_left_sha256,
                });
            }
        }
        Outcome {
            orders: folder.orders.len(),
            lines: folder.orders.iter().map(|order| order.lines.len()).sum(),
            skus: folder.skus().len(),
            repeated_sku_lines: folder.repeated_sku_lines(),
            through_the_cart,
            straight_to_loms,
            concurrency: plan.concurrency,
            seconds: round(seconds, 3),
            orders_per_second: round(folder.orders.len() as f64 / seconds, 1),
            wrong_carts,
            audit: Audit::of(audit),
        }
    }

    /// What cannot be, however many shoppers there were.
    pub fn contradictions(&self, folder: &Folder) -> Vec<String> {
        let mut wrong = Vec::new();
        let (ended, sold, left) = match (&self.through_the_cart, &self.straight_to_loms) {
            (Some(cart), _) => (
                cart.payed + cart.failed + cart.empty_carts,
                cart.units_sold,
                cart.stock_left,
            ),
            (None, Some(loms)) => (loms.payed + loms.failed, loms.units_sold, loms.stock_left),
            (None, None) => return wrong,
        };
        if ended != self.orders as u64 {
            wrong.push(format!("{} orders were played, {ended} ended", self.orders));
        }
        let received = folder.units_received();
        if sold + left != received {
            wrong.push(format!(
                "{received} units were received, {sold} sold, {left} are left"
            ));
        }
        wrong.extend(self.wrong_carts.iter().cloned());
        if !self.audit.consistent {
            wrong.push(format!("loms audit: {}", self.audit.report.join("; ")));
        }
        wrong
    }
}

impl Audit {
    fn of(audit: &Finished) -> Audit {
        let consistent = audit.status.success();
        let report = if consistent {
            &audit.stdout
        } else {
            &format!("{}\n{}", audit.stdout, audit.stderr)
        };
        Audit {
            consistent,
            report: report
                .lines()
                .map(str::to_owned)
                .filter(|line| !line.is_empty())
                .collect(),
        }
    }
}

/// Where an outcome is not what the folder expects, a line each.
pub fn differences(way: Way, outcome: &Outcome, expected: &Value) -> Result<Vec<String>> {
    let actual = serde_json::to_value(outcome)?;
    let section = match way {
        Way::Cart => "through_the_cart",
        Way::Loms => "straight_to_loms",
    };
    let wanted = expected[section]
        .as_object()
        .with_context(|| format!("expected.json has no {section}"))?;
    let got = actual[section]
        .as_object()
        .context("the outcome has no section")?;
    let mut wrong = Vec::new();
    let mut compare = |name: String, expected: &Value, actual: &Value| {
        if expected != actual {
            wrong.push(format!("{name}: expected {expected}, got {actual}"));
        }
    };
    for name in FOLDER_FIGURES {
        compare(name.to_owned(), &expected[name], &actual[name]);
    }
    for (name, value) in wanted {
        compare(
            format!("{section}.{name}"),
            value,
            got.get(name).unwrap_or(&Value::Null),
        );
    }
    for (name, value) in got.iter().filter(|(name, _)| !wanted.contains_key(*name)) {
        compare(format!("{section}.{name}"), &Value::Null, value);
    }
    Ok(wrong)
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

fn round(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}
