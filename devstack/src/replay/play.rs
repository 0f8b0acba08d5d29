//! The shoppers: each takes a user's orders and plays them one after another, as many users at once as the plan allows.

use std::{
    collections::{HashMap, VecDeque},
    ops::AddAssign,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use proto::{
    cart::{AddToCartRequest, PurchaseRequest},
    loms::{CreateOrderRequest, OrderItem, OrderPayedRequest},
};
use tokio::task::JoinSet;
use tonic::{Code, Status};

use super::{Plan, Way, carts};
use crate::{
    clients::{Clients, reason},
    retail::{Folder, Line, Order},
};

/// What became of the orders.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) payed: u64,
    /// Not placed for want of stock.
    pub(super) failed: u64,
    /// Every line refused.
    pub(super) empty_carts: u64,
    pub(super) refused_lines: u64,
    pub(super) units_sold: u64,
    /// Carts, and orders, that are not what their shoppers put into them; a line each.
    pub(super) wrong_carts: Vec<String>,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.payed += other.payed;
        self.failed += other.failed;
        self.empty_carts += other.empty_carts;
        self.refused_lines += other.refused_lines;
        self.units_sold += other.units_sold;
        self.wrong_carts.extend(other.wrong_carts);
    }
}

/// Plays every order of the folder.
pub(super) async fn play(plan: &Plan, folder: &Folder, clients: &Clients) -> Result<Tally> {
    let style = "{elapsed_precise} {wide_bar} {pos}/{len} orders, {per_sec}, {eta} left";
    let progress = ProgressBar::new(folder.orders.len() as u64)
        .with_style(ProgressStyle::with_template(style)?);
    let shoppers = Arc::new(Mutex::new(queues(plan, &folder.orders)));
    let mut workers = JoinSet::new();
    for _ in 0..plan.concurrency {
        let (way, shoppers, clients, progress) = (
            plan.way,
            shoppers.clone(),
            clients.clone(),
            progress.clone(),
        );
        workers.spawn(async move {
            let mut tally = Tally::default();
            loop {
                let next = shoppers
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .pop_front();
                let Some(orders) = next else { return Ok(tally) };
                for order in orders {
                    tally += place(way, clients.clone(), &order).await.with_context(|| {
                        format!(
                            "play an order of user {} with {} lines",
                            order.user,
                            order.lines.len()
                        )
                    })?;
                    progress.inc(1);
                }
            }
        });
    }
    let mut total = Tally::default();
    while let Some(worker) = workers.join_next().await {
        // an error drops the set and with it the other shoppers
        let played: Result<Tally> = worker.context("a shopper panicked")?;
        total += played?;
    }
    progress.finish_and_clear();
    Ok(total)
}

/// One queue with everything for a lone shopper, who keeps the order of the folder; else a queue a user.
fn queues(plan: &Plan, orders: &[Order]) -> VecDeque<Vec<Order>> {
    if plan.concurrency == 1 {
        return VecDeque::from([orders.to_vec()]);
    }
    let mut queues: VecDeque<Vec<Order>> = VecDeque::new();
    let mut places = HashMap::new();
    for order in orders {
        let place = *places.entry(order.user).or_insert_with(|| {
            queues.push_back(Vec::new());
            queues.len() - 1
        });
        queues[place].push(order.clone());
    }
    queues
}

async fn place(way: Way, clients: Clients, order: &Order) -> Result<Tally> {
    match way {
        Way::Cart => through_the_cart(clients, order).await,
        Way::Loms => straight_to_loms(clients, order).await,
    }
}

async fn through_the_cart(mut clients: Clients, order: &Order) -> Result<Tally> {
    let user = order.user;
    let mut tally = Tally::default();
    let mut cart: Vec<Line> = Vec::new();
    for line in &order.lines {
        let request = AddToCartRequest {
            user,
            sku: line.sku,
            count: line.count,
        };
        match clients.cart.add_to_cart(request).await {
            Ok(_) => cart.push(*line),
            Err(status) if out_of_stock(&status) => tally.refused_lines += 1,
            Err(status) => return Err(status).context("AddToCart"),
        }
    }
    if cart.is_empty() {
        tally.empty_carts += 1;
        return Ok(tally);
    }
    let request = PurchaseRequest {
        user,
        ..Default::default()
    };
    match clients.cart.purchase(request).await {
        Ok(response) => {
            let order_id = response.into_inner().order_id;
            tally
                .wrong_carts
                .extend(carts::ordered(&mut clients, order_id, &cart).await?);
            let request = OrderPayedRequest { order_id };
            clients
                .loms
                .order_payed(request)
                .await
                .context("OrderPayed")?;
            tally.payed += 1;
            tally.units_sold += units(&cart);
        }
        // another shopper was faster and the cart is as it was: this one gives up, so that the next order starts empty
        Err(status) if out_of_stock(&status) => {
            tally.failed += 1;
            tally
                .wrong_carts
                .extend(carts::give_up(&mut clients, user, &cart).await?);
        }
        Err(status) => return Err(status).context("Purchase"),
    }
    Ok(tally)
}

async fn straight_to_loms(mut clients: Clients, order: &Order) -> Result<Tally> {
    let items = order
        .lines
        .iter()
        .map(|line| OrderItem {
            sku: line.sku,
            count: line.count,
        })
        .collect();
    let request = CreateOrderRequest {
        user: order.user,
        items,
        ..Default::default()
    };
    let placed = clients
        .loms
        .create_order(request)
        .await
        .context("CreateOrder")?
        .into_inner();
    match placed.status.as_str() {
        "awaiting payment" => {
            let request = OrderPayedRequest {
                order_id: placed.order_id,
            };
            clients
                .loms
                .order_payed(request)
                .await
                .context("OrderPayed")?;
            Ok(Tally {
                payed: 1,
                units_sold: units(&order.lines),
                ..Tally::default()
            })
        }
        "failed" => Ok(Tally {
            failed: 1,
            ..Tally::default()
        }),
        status => bail!(
            "CreateOrder answered the status {status:?} for order {}",
            placed.order_id
        ),
    }
}

fn units(lines: &[Line]) -> u64 {
    lines.iter().map(|line| u64::from(line.count)).sum()
}

fn out_of_stock(status: &Status) -> bool {
    status.code() == Code::FailedPrecondition && reason(status) == "INSUFFICIENT_STOCK"
}
