//! A thousand calls at once: what they answer and what they leave is what some order of them, one after another, would.

use std::time::{Duration, Instant};

use futures::future::join_all;
use proto::cart::DeleteFromCartRequest;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::{Value, json};
use tonic::Code;

use crate::{
    process::Process,
    test_app::{Neighbours, TestApp, config, connect, eventually, fill, refused},
};

const USERS: i64 = 10;
const SKUS: u32 = 20;
/// For each user and SKU: few enough to try every order of them.
const CALLS: usize = 5;

/// A call that adds or takes units.
#[derive(Clone, Copy, Debug)]
enum Call {
    Add(u32),
    Delete(u32),
}

/// What it was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Done,
    NoStock,
    NotInCart,
}

/// One call on a line of `held` units, the way the table of answers has it.
fn step(call: Call, held: u32, on_sale: u32) -> (Answer, u32) {
    match call {
        Call::Add(units) if held + units > on_sale => (Answer::NoStock, held),
        Call::Add(units) => (Answer::Done, held + units),
        Call::Delete(_) if held == 0 => (Answer::NotInCart, 0),
        Call::Delete(units) => (Answer::Done, held.saturating_sub(units)),
    }
}

/// Whether some order of the calls gives these answers and leaves `left`.
fn explained(answered: &[(Call, Answer)], held: u32, on_sale: u32, left: u32) -> bool {
    if answered.is_empty() {
        return held == left;
    }
    (0..answered.len()).any(|first| {
        let (call, answer) = answered[first];
        let (expected, then) = step(call, held, on_sale);
        let mut rest = answered.to_vec();
        rest.remove(first);
        expected == answer && explained(&rest, then, on_sale, left)
    })
}

#[test]
fn the_model_knows_what_cannot_be() {
    use Answer::{Done, NoStock, NotInCart};
    let lost = [(Call::Add(2), Done), (Call::Add(3), Done)];
    assert!(explained(&lost, 0, 9, 5) && !explained(&lost, 0, 9, 3));
    assert!(!explained(&lost, 0, 4, 5), "more than there is");
    let both = [(Call::Add(2), Done), (Call::Delete(1), NotInCart)];
    assert!(explained(&both, 0, 9, 2) && !explained(&both, 0, 9, 1));
    assert!(!explained(&[(Call::Add(2), NoStock)], 0, 9, 0));
}

async fn make(app: &TestApp, user: i64, sku: u32, call: Call) -> Answer {
    let answer = match call {
        Call::Add(units) => app.add(user, sku, units).await,
        Call::Delete(units) => app.delete(user, sku, units).await,
    };
    match answer {
        Ok(()) => Answer::Done,
        Err(status) if status.code() == Code::NotFound => Answer::NotInCart,
        refusal => {
            refused(refusal, Code::FailedPrecondition, "INSUFFICIENT_STOCK");
            Answer::NoStock
        }
    }
}

/// Bounds that a thousand calls at once do not meet: here nothing is to be refused for being too much.
fn roomy() -> Value {
    json!({
        "limits": {"in_flight": 2_000, "request_timeout": "60s"},
        "postgres": {"acquire_timeout": "60s", "lock_timeout": "60s"},
        "loms": {"timeout": "60s"},
    })
}

#[tokio::test]
async fn a_thousand_calls_at_once_end_as_some_order_of_them_would() {
    let pool = crate::database().await;
    let app = TestApp::start_with(pool, roomy()).await;
    let mut random = StdRng::seed_from_u64(20_101_201);
    // tight: a few calls use it up
    let on_sale = |sku: u32| 4 + sku % 5;
    for sku in 1..=SKUS {
        app.loms.stock(sku, u64::from(on_sale(sku)));
    }
    let keys: Vec<_> = (1..=USERS)
        .flat_map(|user| (1..=SKUS).map(move |sku| (user, sku)))
        .collect();
    let mut calls: Vec<_> = keys
        .repeat(CALLS)
        .into_iter()
        .map(|(user, sku)| {
            let units = random.random_range(1..=4);
            let delete = random.random_bool(0.4);
            (
                user,
                sku,
                if delete {
                    Call::Delete(units)
                } else {
                    Call::Add(units)
                },
            )
        })
        .collect();
    assert_eq!(calls.len(), 1_000);
    calls.shuffle(&mut random);
    let making = calls
        .iter()
        .map(async |(user, sku, call)| (*user, *sku, *call, make(&app, *user, *sku, *call).await));
    let answers = join_all(making).await;

    for user in 1..=USERS {
        let cart = app.cart(user).await;
        for sku in 1..=SKUS {
            let left = cart
                .iter()
                .find(|(held, _)| *held == sku)
                .map_or(0, |(_, count)| *count);
            let answered: Vec<_> = answers
                .iter()
                .filter(|(of, what, ..)| (*of, *what) == (user, sku))
                .map(|(_, _, call, answer)| (*call, *answer))
                .collect();
            assert!(
                left <= on_sale(sku),
                "user {user}, SKU {sku}: {left} of {}",
                on_sale(sku)
            );
            assert!(
                explained(&answered, 0, on_sale(sku), left),
                "user {user}, SKU {sku}, {} on sale: {answered:?} left {left}",
                on_sale(sku)
            );
        }
    }
    let happened = |what: Answer| {
        answers
            .iter()
            .filter(|(.., answer)| *answer == what)
            .count()
    };
    for what in [Answer::Done, Answer::NoStock, Answer::NotInCart] {
        assert!(
            happened(what) > 20,
            "{what:?} is worth testing: {}",
            happened(what)
        );
    }
    app.finish().await;
}

#[tokio::test]
async fn first_calls_that_come_together_take_all_there_is_and_no_more() {
    let pool = crate::database().await;
    let app = TestApp::start(pool).await;
    app.loms.stock(5, 15);
    let answers = join_all((0..40).map(|_| app.add(1, 5, 1))).await;
    let taken = answers.iter().filter(|answer| answer.is_ok()).count();
    let refusals: Vec<_> = answers.into_iter().filter(Result::is_err).collect();
    assert_eq!((taken, refusals.len()), (15, 25));
    for refusal in refusals {
        let metadata = refused(refusal, Code::FailedPrecondition, "INSUFFICIENT_STOCK");
        assert_eq!(metadata["available"], "15");
    }
    assert_eq!(app.cart(1).await, [(5, 15)]);
    app.finish().await;
}

#[tokio::test]
async fn purchases_between_adds_order_every_unit_once() {
    let pool = crate::database().await;
    let app = TestApp::start_with(pool, roomy()).await;
    app.loms.stock(5, 10_000);
    let buy = async |user: i64| match app.purchase(user).await {
        // another of the user's clients was first
        Err(status) if status.code() == Code::FailedPrecondition => {
            refused(Err::<(), _>(status), Code::FailedPrecondition, "EMPTY_CART");
        }
        bought => drop(bought.unwrap()),
    };
    let clients = (0..24).map(async |n| {
        let user = n % 3 + 1;
        for _ in 0..5 {
            app.add(user, 5, 1).await.unwrap();
            app.add(user, 5, 1).await.unwrap();
            buy(user).await;
        }
        app.add(user, 5, 1).await.unwrap();
    });
    join_all(clients).await;
    let in_carts = join_all((1..=3).map(|user| app.cart(user))).await;
    let in_carts: u32 = in_carts.iter().flatten().map(|(_, count)| count).sum();
    let orders = app.loms.orders();
    let ordered = orders.iter().flat_map(|order| &order.lines);
    let ordered: u32 = ordered.map(|(_, count)| count).sum();
    assert!(orders.len() > 10, "{} orders", orders.len());
    assert_eq!(24 * (5 * 2 + 1), in_carts + ordered);
    app.finish().await;
}

/// A cart that is locked, and many calls of its user: they wait for it on few of the connections.
#[tokio::test]
async fn the_calls_of_one_user_leave_the_others_room() {
    let pool = crate::database().await;
    let app = TestApp::start_with(pool, json!({"postgres": {"lock_timeout": "4s"}})).await;
    app.loms.stock(7, 1_000);
    app.add(1, 7, 1).await.unwrap();
    let mut locked = app.pool.begin().await.unwrap();
    let lock = "SELECT FROM checkout.cart WHERE user_id = 1 FOR UPDATE";
    sqlx::query(lock).execute(&mut *locked).await.unwrap();
    let of_one = join_all((0..40).map(|number| {
        let app = &app;
        async move {
            match number % 2 {
                0 => app.add(1, 7, 1).await.err(),
                _ => app.delete(1, 7, 1).await.err(),
            }
        }
    }));
    let of_others = async {
        let waiting = "SELECT count(*) FROM pg_stat_activity
            WHERE wait_event_type = 'Lock' AND datname = current_database()";
        eventually("calls that wait for the cart", async || {
            sqlx::query_scalar::<_, i64>(waiting)
                .fetch_one(&app.pool)
                .await
                .unwrap()
                > 1
        })
        .await;
        for user in 2..22 {
            let began = Instant::now();
            app.add(user, 7, 1).await.expect("room beside one user");
            assert!(
                began.elapsed() < Duration::from_secs(1),
                "{:?}",
                began.elapsed()
            );
        }
        locked.rollback().await.unwrap();
    };
    let (of_one, ()) = tokio::join!(of_one, of_others);
    let refused = of_one.iter().flatten().map(tonic::Status::code);
    let known = [Code::ResourceExhausted, Code::NotFound];
    assert!(
        refused.clone().all(|code| known.contains(&code)),
        "{of_one:?}"
    );
    assert!(refused.count() < 40);
    app.finish().await;
}

/// What a call began goes on when its caller leaves, and keeps its place until it has ended.
#[tokio::test]
async fn callers_who_leave_begin_no_more_than_there_are_places() {
    const PLACES: usize = 20;
    let pool = crate::database().await;
    let neighbours = Neighbours::start().await;
    let changes = json!({
        "limits": {"in_flight": PLACES, "request_timeout": "20s"},
        "postgres": {"acquire_timeout": "20s", "lock_timeout": "20s", "statement_timeout": "30s"},
    });
    fill(&pool, 1, &(7..8)).await;
    // the gauge belongs to the process, and other tests have services in this one
    let process = Process::start(&config(&pool, neighbours.addresses, &changes));
    let client = connect(process.grpc).await;
    let delete = async || {
        let request = DeleteFromCartRequest {
            user: 1,
            sku: 7,
            count: 1,
        };
        client.clone().delete_from_cart(request).await
    };
    let mut locked = pool.begin().await.unwrap();
    let lock = "SELECT FROM checkout.cart WHERE user_id = 1 FOR UPDATE";
    sqlx::query(lock).execute(&mut *locked).await.unwrap();
    for _ in 0..10 {
        let leave = Duration::from_millis(200);
        let calls = (0..PLACES).map(|_| tokio::time::timeout(leave, delete()));
        join_all(calls).await;
    }
    let waiting = process
        .metric("checkout_pool_waiting{pool=\"checkout\"}")
        .await;
    assert!(
        waiting > 0.0 && waiting <= PLACES as f64,
        "{waiting} calls wait"
    );
    locked.rollback().await.unwrap();
    // the first to get the lock has removed the line
    eventually("places again", async || {
        delete()
            .await
            .is_err_and(|refused| refused.code() == Code::NotFound)
    })
    .await;
}
