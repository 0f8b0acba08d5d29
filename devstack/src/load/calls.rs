//! The calls of a load: what each kind does, and what it needs to have been done before.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use anyhow::{Result, ensure};
use proto::loms::{
    CancelOrderRequest, CreateOrderRequest, ListOrderRequest, OrderPayedRequest, StocksRequest,
    loms_client::LomsClient,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::task::JoinSet;
use tonic::{Status, transport::Channel};

use super::{measure::Caller, skus::Skus};

/// Orders are made by so many callers at once when they are only preparation.
const PREPARERS: usize = 64;
/// Users of the shop.
pub(super) const USERS: i64 = 100_000;

/// What orders look like.
#[derive(Clone)]
pub(super) struct Shape {
    pub(super) skus: Skus,
    pub(super) lines: usize,
    /// Whether each call carries an idempotency key.
    pub(super) keys: bool,
    /// Tells the keys of one run from those of another.
    pub(super) run: String,
}

impl Shape {
    fn request(&self, caller: &mut Caller, number: usize) -> CreateOrderRequest {
        let idempotency_key = if self.keys {
            format!("{}-{}-{number}", self.run, caller.index)
        } else {
            String::new()
        };
        CreateOrderRequest {
            user: caller.random.random_range(1..=USERS),
            items: self.skus.order(self.lines, &mut caller.random),
            idempotency_key,
        }
    }
}

/// Orders that wait to be payed or looked at, each given out once or again and again.
#[derive(Clone)]
pub(super) struct Prepared {
    orders: Arc<Vec<i64>>,
    next: Arc<AtomicUsize>,
}

impl Prepared {
    /// Makes orders as fast as the server does.
    pub(super) async fn make(
        shape: &Shape,
        many: usize,
        loms: impl Fn(usize) -> LomsClient<Channel> + Clone + Send + Sync + 'static,
    ) -> Result<Prepared> {
        let next = Arc::new(AtomicUsize::new(0));
        let mut callers = JoinSet::new();
        for index in 0..PREPARERS {
            let (next, shape, mut client) = (next.clone(), shape.clone(), loms(index));
            callers.spawn(async move {
                let random = StdRng::seed_from_u64(u64::MAX - index as u64);
                let mut caller = Caller { index, random };
                let mut made = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= many {
                        return anyhow::Ok(made);
                    }
                    let mut request = shape.request(&mut caller, number);
                    if !request.idempotency_key.is_empty() {
                        request.idempotency_key.push_str("-prepared");
                    }
                    let placed = client.create_order(request).await?.into_inner();
                    ensure!(
                        placed.status.is_empty() || placed.status == "awaiting payment",
                        "an order of the preparation is {}",
                        placed.status
                    );
                    made.push(placed.order_id);
                }
            });
        }
        let mut orders = Vec::with_capacity(many);
        while let Some(made) = callers.join_next().await {
            orders.extend(made??);
        }
        Ok(Prepared {
            orders: Arc::new(orders),
            next: Arc::new(AtomicUsize::new(0)),
        })
    }

    /// A million of the orders that are in the tables since they were filled, spread over all.
    pub(super) fn filled(orders: i64) -> Prepared {
        let step = usize::try_from(orders / 1_000_000).unwrap_or_default();
        Prepared {
            orders: Arc::new((1..=orders).step_by(step.max(1)).collect()),
            next: Arc::new(AtomicUsize::new(0)),
        }
    }

    /// The next order that nobody had yet.
    fn take(&self) -> Option<i64> {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        self.orders.get(next).copied()
    }

    /// Any of them.
    pub(super) fn any(&self, random: &mut StdRng) -> Option<i64> {
        let index = random.random_range(0..self.orders.len().max(1));
        self.orders.get(index).copied()
    }
}

/// One CreateOrder: counted by the status of the order.
pub(super) async fn create(
    client: &mut LomsClient<Channel>,
    shape: &Shape,
    caller: &mut Caller,
) -> String {
    let number = caller.random.random::<u32>() as usize;
    let request = shape.request(caller, number);
    match client.create_order(request).await {
        Ok(placed) => format!("OK {}", placed.into_inner().status),
        Err(status) => code(&status),
    }
}

/// One OrderPayed of an order that awaits it; `None` when all are payed.
pub(super) async fn pay(client: &mut LomsClient<Channel>, prepared: &Prepared) -> Option<String> {
    let order_id = prepared.take()?;
    Some(
        match client.order_payed(OrderPayedRequest { order_id }).await {
            Ok(_) => "OK".to_owned(),
            Err(status) => code(&status),
        },
    )
}

/// A whole order: made, then of ten eight are payed, one is cancelled, one is left to expire.
pub(super) async fn whole(
    client: &mut LomsClient<Channel>,
    shape: &Shape,
    caller: &mut Caller,
) -> String {
    let number = caller.random.random::<u32>() as usize;
    let request = shape.request(caller, number);
    let placed = match client.create_order(request).await {
        Ok(placed) => placed.into_inner(),
        Err(status) => return code(&status),
    };
    if placed.status == "failed" {
        return "OK failed".to_owned();
    }
    let order_id = placed.order_id;
    let (ended, end) = match caller.random.random_range(0..10) {
        0 => return "OK left".to_owned(),
        1 => {
            let request = CancelOrderRequest { order_id };
            (client.cancel_order(request).await.map(drop), "OK cancelled")
        }
        _ => {
            let request = OrderPayedRequest { order_id };
            (client.order_payed(request).await.map(drop), "OK payed")
        }
    };
    match ended {
        Ok(()) => end.to_owned(),
        Err(status) => code(&status),
    }
}

/// One Stocks.
pub(super) async fn stocks(
    client: &mut LomsClient<Channel>,
    skus: &Skus,
    caller: &mut Caller,
) -> String {
    let sku = skus.one(&mut caller.random);
    match client.stocks(StocksRequest { sku }).await {
        Ok(_) => "OK".to_owned(),
        Err(status) => code(&status),
    }
}

/// One ListOrder.
pub(super) async fn list_order(
    client: &mut LomsClient<Channel>,
    prepared: &Prepared,
    caller: &mut Caller,
) -> Option<String> {
    let order_id = prepared.any(&mut caller.random)?;
    Some(
        match client.list_order(ListOrderRequest { order_id }).await {
            Ok(_) => "OK".to_owned(),
            Err(status) => code(&status),
        },
    )
}

pub(super) fn code(status: &Status) -> String {
    format!("{:?}", status.code())
}
