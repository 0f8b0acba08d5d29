//! What ProductService allows, counted at its end: never more, hardly less, and everybody in turn.

use std::{ops::Range, time::Duration};

use futures::future::join_all;
use proto::cart::{ListCartRequest, cart_client::CartClient};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{task::JoinSet, time::Instant};
use tonic::{Code, Request, Status, transport::Channel};

use crate::{
    process::Process,
    products_stub::{ALLOWED, ProductsStub},
    test_app::{Neighbours, config, connect, eventually, fill},
};

/// How long callers press; `LIMITS_SECONDS=20` for a longer look.
fn seconds() -> u64 {
    let given = std::env::var("LIMITS_SECONDS").ok();
    given.map_or(4, |text| text.parse().unwrap())
}

/// A checkout of its own process and a ProductService of its own thread: neither is held up by the callers.
struct Shop {
    process: Process,
    products: ProductsStub,
    _serving: JoinSet<()>,
}

impl Shop {
    /// With these carts, one unit of each SKU in them.
    async fn open(pool: &PgPool, changes: Value, carts: &[(i64, Range<u32>)]) -> Self {
        let mut serving = JoinSet::new();
        let products = ProductsStub::start_apart(&mut serving).await;
        let neighbours = Neighbours::beside(products, serving).await;
        for (user, skus) in carts {
            fill(pool, *user, skus).await;
        }
        Self {
            process: Process::start(&config(pool, neighbours.addresses, &changes)),
            products: neighbours.products,
            _serving: neighbours.serving,
        }
    }

    async fn client(&self) -> CartClient<Channel> {
        connect(self.process.grpc).await
    }

    fn assert_within_limits(&self) {
        let seen = (
            self.products.most_in_a_second(),
            self.products.most_at_once(),
        );
        assert!(seen.0 <= ALLOWED.0 && seen.1 <= ALLOWED.1, "{seen:?}");
        assert_eq!(self.products.refused(), 0);
    }
}

async fn list(mut client: CartClient<Channel>, user: i64) -> Result<usize, Status> {
    let listed = client.list_cart(ListCartRequest { user }).await?;
    Ok(listed.into_inner().items.len())
}

fn cache_off() -> Value {
    json!({"products": {"cache_ttl": "0s"}, "limits": {"request_timeout": "60s"}})
}

/// The SKUs of a user: nobody else's, so that every line of every call is a request.
fn own_skus(user: i64, lines: u32) -> (i64, Range<u32>) {
    let first = u32::try_from(user).unwrap() * 1_000;
    (user, first..first + lines)
}

#[tokio::test]
async fn fifty_callers_use_what_is_allowed_and_never_more() {
    let pool = crate::database().await;
    fifty_callers(pool, Duration::ZERO, 0.9).await;
}

#[tokio::test]
async fn fifty_callers_use_what_a_slow_one_allows_and_never_more() {
    let pool = crate::database().await;
    // slower than the margin for arrivals, which costs 7 %, and quick enough for ten a second, five at once; a short look
    // may end just before the next ten
    let least = if seconds() >= 20 { 0.9 } else { 0.8 };
    fifty_callers(pool, Duration::from_millis(300), least).await;
}

async fn fifty_callers(pool: PgPool, delay: Duration, least: f64) {
    let lines = |user: i64| match user {
        1 => 500,
        _ => 1 + u32::try_from(user).unwrap() % 5,
    };
    let carts: Vec<_> = (1..=50).map(|user| own_skus(user, lines(user))).collect();
    let shop = Shop::open(&pool, cache_off(), &carts).await;
    shop.products.limit();
    shop.products.delay(delay);
    let client = shop.client().await;
    let until = Instant::now() + Duration::from_secs(seconds());
    let press = async |user: i64| {
        let again = async {
            loop {
                list(client.clone(), user).await.unwrap();
            }
        };
        let _: Result<(), _> = tokio::time::timeout_at(until, again).await;
    };
    let asked = || {
        let asked = carts
            .iter()
            .map(|(_, skus)| shop.products.asked_of(skus.clone()));
        asked.collect::<Vec<_>>()
    };
    // the first second belongs to those who happened to come first
    let all_in_line = async {
        eventually("all are in line", async || {
            shop.products.requests() >= 2 * ALLOWED.0
        })
        .await;
        asked()
    };
    let (_, before) = tokio::join!(join_all((1..=50).map(press)), all_in_line);
    shop.assert_within_limits();
    let requests = shop.products.requests();
    let used = requests as f64 / (ALLOWED.0 as u64 * seconds()) as f64;
    let since = asked()
        .into_iter()
        .zip(&before)
        .map(|(now, before)| now - before);
    let most = since.max().unwrap();
    eprintln!(
        "{requests} requests, {used:.3} of what is allowed, at most {most} for one caller since all were in line"
    );
    assert!(
        used > least,
        "{used:.3} of what is allowed, {requests} requests"
    );
    assert!(
        most <= requests / 50 + 2,
        "{most} of {requests} for one caller"
    );
}

#[tokio::test]
async fn small_carts_are_answered_while_one_of_500_lines_is_in_progress() {
    let pool = crate::database().await;
    let small = 2..=5;
    let mut carts = vec![own_skus(1, 500)];
    carts.extend(small.clone().map(|user| own_skus(user, 2)));
    let shop = Shop::open(&pool, cache_off(), &carts).await;
    shop.products.limit();
    let client = shop.client().await;
    let mut callers = JoinSet::new();
    callers.spawn(list(client.clone(), 1));
    eventually("the large cart has all it may", async || {
        shop.products.requests() >= ALLOWED.0
    })
    .await;
    let answered = async |user: i64| {
        for _ in 0..3 {
            let began = Instant::now();
            assert_eq!(list(client.clone(), user).await.unwrap(), 2);
            // five callers in turn have two requests a second each; behind the large cart it would be a minute
            let took = began.elapsed();
            assert!(took < Duration::from_secs(8), "{took:?}");
        }
    };
    join_all(small.map(answered)).await;
    assert!(callers.try_join_next().is_none(), "the large cart goes on");
    shop.assert_within_limits();
}

#[tokio::test]
async fn a_small_cart_is_answered_at_once() {
    let pool = crate::database().await;
    let shop = Shop::open(&pool, cache_off(), &[own_skus(1, 10)]).await;
    shop.products.limit();
    let client = shop.client().await;
    let mut quickest = Duration::MAX;
    // a busy machine may be slow, but not each time
    for _ in 0..3 {
        let began = Instant::now();
        assert_eq!(list(client.clone(), 1).await.unwrap(), 10);
        quickest = quickest.min(began.elapsed());
        // until the whole allowance is back
        tokio::time::sleep(Duration::from_millis(1_200)).await;
    }
    // a bucket that trickles would take nine tenths of a second
    assert!(quickest < Duration::from_millis(500), "{quickest:?}");
    shop.assert_within_limits();
}

/// As large a cart as one call cannot price, with ten times the allowance so that it takes seconds.
fn large(request_timeout: &str) -> Value {
    json!({
        "products": {"per_second": 100, "at_once": 50},
        "limits": {"request_timeout": request_timeout},
    })
}

#[tokio::test]
async fn what_a_call_that_ran_out_of_time_has_learnt_serves_the_next() {
    let pool = crate::database().await;
    let shop = Shop::open(&pool, large("1s"), &[own_skus(1, 350)]).await;
    let client = shop.client().await;
    let mut calls = 0;
    loop {
        calls += 1;
        let before = shop.products.requests();
        match list(client.clone(), 1).await {
            Ok(lines) => break assert_eq!(lines, 350),
            Err(status) => assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}"),
        }
        let learnt = shop.products.requests() - before;
        assert!(learnt >= 80, "call {calls} learnt about {learnt} products");
    }
    assert!((3..=5).contains(&calls), "{calls} calls");
    assert_eq!(shop.products.requests(), 350, "nothing was asked twice");
}

#[tokio::test]
async fn who_may_wait_for_a_large_cart_gets_it_in_one_call() {
    let pool = crate::database().await;
    let shop = Shop::open(&pool, large("60s"), &[own_skus(1, 250)]).await;
    let mut client = shop.client().await;
    let mut request = Request::new(ListCartRequest { user: 1 });
    request.set_timeout(Duration::from_secs(30));
    let listed = client.list_cart(request).await.unwrap().into_inner();
    assert_eq!((listed.items.len(), listed.total_price), (250, 2_500));
}
