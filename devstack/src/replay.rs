//! Plays a folder of real orders through a stack of its own and holds what comes out against the folder's expectation.
//!
//! One shopper at a time must give exactly `expected.json`. Many at once may not (who comes first gets the last unit), but
//! every unit must still be on sale or sold, every order must be what its cart held, and `loms audit` must find nothing.

mod carts;
mod outcome;
mod play;
mod stock;

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    binaries::Binaries,
    failure::{Misuse, after_cleanup},
    retail::Folder,
    signals::Stop,
    stack::{Options, Stack},
};

pub use outcome::{Outcome, differences};

/// Which way an order takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// Each line is an AddToCart, then Purchase and OrderPayed
    Cart,
    /// Each order is one CreateOrder, paid when it awaits payment
    Loms,
}

/// What to play, and how.
#[derive(Debug)]
pub struct Plan {
    pub dir: PathBuf,
    pub way: Way,
    /// Shoppers at once; one shopper's orders are always one after another.
    pub concurrency: usize,
    /// Where the outcome goes besides stdout.
    pub json: Option<PathBuf>,
}

/// Plays the plan on a fresh stack and prints the outcome; anything that does not add up is an error.
pub async fn run(plan: &Plan, binaries: Binaries) -> Result<()> {
    let folder = Folder::read(&plan.dir)?;
    let expected = read_expected(&plan.dir)?;
    let mut stop = Stop::listen()?;
    let stack = stop
        .interrupts(Stack::start(&Options::new(binaries)))
        .await?;
    let played = stop.interrupts(play_and_count(plan, &folder, &stack)).await;
    let judged = played.and_then(|outcome| say(plan, &folder, &outcome, &expected));
    after_cleanup(judged, stop.impatient(stack.stop()).await)
}

fn say(plan: &Plan, folder: &Folder, outcome: &Outcome, expected: &Value) -> Result<()> {
    let json = serde_json::to_string_pretty(outcome)?;
    println!("{json}");
    if let Some(file) = &plan.json {
        std::fs::write(file, json + "\n").with_context(|| format!("write {}", file.display()))?;
    }
    judge(plan, folder, outcome, expected)
}

fn read_expected(dir: &Path) -> Result<Value> {
    let file = dir.join("expected.json");
    let misuse = |error: String| {
        Misuse::error(
            format!("reading {}: {error}", file.display()),
            "name a folder that has one",
        )
    };
    let text = std::fs::read_to_string(&file).map_err(|error| misuse(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| misuse(error.to_string()))
}

/// Plays the folder on a stack that runs with empty databases.
pub async fn play_and_count(plan: &Plan, folder: &Folder, stack: &Stack) -> Result<Outcome> {
    stack.receive_stock(&plan.dir.join("stock.csv")).await?;
    let clients = stack.clients()?;
    let since = Instant::now();
    let mut tally = play::play(plan, folder, &clients).await?;
    let seconds = since.elapsed().as_secs_f64();
    tally
        .wrong_carts
        .extend(carts::left(folder, &clients).await?);
    let left = stock::left(folder, &clients).await?;
    let audit = stack.command("loms", &["audit"]).await?;
    Ok(Outcome::new(plan, folder, tally, &left, seconds, &audit))
}

fn judge(plan: &Plan, folder: &Folder, outcome: &Outcome, expected: &Value) -> Result<()> {
    let mut wrong = outcome.contradictions(folder);
    if plan.concurrency == 1 {
        wrong.extend(differences(plan.way, outcome, expected)?);
    }
    if wrong.is_empty() {
        let against = if plan.concurrency == 1 {
            "equals expected.json"
        } else {
            "adds up"
        };
        eprintln!(
            "{}: what came out {against}, the audit found nothing",
            plan.dir.display()
        );
        return Ok(());
    }
    bail!(
        "what came out of {} is wrong\n  {}",
        plan.dir.display(),
        wrong.join("\n  ")
    )
}
