//! A walk through a purchase and everything that can become of it, on real services: each step is shown as it happens and
//! checked; the first thing that is not as the contract says ends the walk.

mod bad_input;
mod http;
mod orders;
mod walk;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use proto::{
    loms::{ListOrderRequest, ListOrderResponse, StocksRequest},
    notifications::GetHistoryWithPeriodRequest,
};

use self::walk::Walk;
use crate::{
    binaries::Binaries,
    clients::{Clients, period_around_now},
    failure::after_cleanup,
    signals::Stop,
    stack::{Options, Stack},
};

/// In place of 10 minutes. Every other order of the walk is paid, cancelled or failed well within it.
const PAYMENT_TIMEOUT: &str = "6s";
/// The payment timeout, the sweeper's half second, and room for a busy machine.
const EXPIRY_BOUND: Duration = Duration::from_secs(25);
/// An event passes outbox, broker and consumer in well under a second, but a consumer's first join takes three.
const HISTORY_BOUND: Duration = Duration::from_secs(30);

/// In good supply.
const HEART: u32 = 85_123_001;
/// In good supply too; smaller than [`HEART`], so it comes first in a cart.
const LANTERN: u32 = 71_053_000;
/// The shop has one of these.
const JARS: u32 = 85_159_001;

/// Runs the walk on a stack of its own.
pub async fn run(binaries: Binaries) -> Result<()> {
    let since = Instant::now();
    println!("Starting the stack");
    let mut stop = Stop::listen()?;
    let options = Options {
        payment_timeout: PAYMENT_TIMEOUT,
        ..Options::new(binaries)
    };
    let stack = stop.interrupts(Stack::start(&options)).await?;
    let walked = stop.interrupts(walk(&stack)).await;
    if walked.is_err() {
        eprintln!("{}", stack.logs());
    }
    let walked = walked.map(|walk| {
        let (steps, checks) = walk.counts();
        let seconds = since.elapsed().as_secs_f32();
        println!(
            "\nA purchase runs end to end: {steps} steps, {checks} checks, all as they should be, in {seconds:.0} s."
        );
    });
    after_cleanup(walked, stop.impatient(stack.stop()).await)
}

/// The walk itself, for a stack whose payment timeout is a few seconds.
pub async fn walk(stack: &Stack) -> Result<Walk> {
    let mut walk = Walk::default();
    let mut clients = stack.clients()?;
    orders::receive(&mut walk, stack, &mut clients).await?;
    let payed = orders::payed(&mut walk, &mut clients).await?;
    let cancelled = orders::cancelled(&mut walk, &mut clients).await?;
    let unpaid = orders::left_unpaid(&mut walk, &mut clients).await?;
    let failed = orders::failed(&mut walk, &mut clients).await?;
    http::purchase(&mut walk, &mut clients).await?;
    bad_input::over_grpc(&mut walk, &mut clients).await?;
    bad_input::over_http(&mut walk, &clients).await?;
    orders::expired(&mut walk, &mut clients, unpaid).await?;

    walk.step("Notifications: what each user was told, in order");
    for placed in [payed, cancelled, unpaid, failed] {
        let told = history(&mut clients, placed).await?;
        walk.check(
            &format!("messages about order {}", placed.order),
            told,
            placed.history(),
        )?;
    }
    walk.step("loms audit: stock, reservations, write-offs, histories and events recounted");
    let audit = stack.command("loms", &["audit"]).await?;
    let code = audit.status.code();
    walk.show(&audit.stdout);
    walk.show(&audit.stderr);
    walk.check("exit code", code, Some(0))?;
    Ok(walk)
}

/// An order of the walk and how it must end.
#[derive(Debug, Clone, Copy)]
struct Placed {
    order: i64,
    user: i64,
    end: &'static str,
}

impl Placed {
    /// Every status that it goes through.
    fn history(&self) -> Vec<String> {
        let reserved = (self.end != "failed").then_some("awaiting payment");
        ["new"]
            .into_iter()
            .chain(reserved)
            .chain([self.end])
            .map(str::to_owned)
            .collect()
    }
}

/// Units on sale over all warehouses.
async fn on_sale(clients: &mut Clients, sku: u32) -> Result<u64> {
    let stocks = clients
        .loms
        .stocks(StocksRequest { sku })
        .await
        .context("Stocks")?
        .into_inner()
        .stocks;
    Ok(stocks.iter().map(|stock| stock.count).sum())
}

async fn list_order(clients: &mut Clients, order: i64) -> Result<ListOrderResponse> {
    Ok(clients
        .loms
        .list_order(ListOrderRequest { order_id: order })
        .await
        .context("ListOrder")?
        .into_inner())
}

/// The statuses that the order's user was told, as soon as there are as many as there must be.
async fn history(clients: &mut Clients, placed: Placed) -> Result<Vec<String>> {
    let by = Instant::now() + HISTORY_BOUND;
    let (from, to) = period_around_now();
    loop {
        let request = GetHistoryWithPeriodRequest {
            user: placed.user,
            from: Some(from),
            to: Some(to),
            ..Default::default()
        };
        let messages = clients
            .notifications
            .get_history_with_period(request)
            .await
            .context("GetHistoryWithPeriod")?;
        let of_order = messages
            .into_inner()
            .messages
            .into_iter()
            .filter(|message| message.order_id == placed.order);
        let told: Vec<_> = of_order.map(|message| message.status).collect();
        if told.len() >= placed.history().len() || Instant::now() > by {
            return Ok(told);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
