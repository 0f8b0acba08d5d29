//! Idempotency keys grow old: they are swept in small batches, and whoever uses one at that very moment gets an order.

use serde_json::json;
use sqlx::{PgConnection, PgPool, Postgres, Transaction};

use crate::{
    oracle::{self, no_deadlocks, rows},
    test_app::{TestApp, arrived, eventually, lock_waiters, order, sit_on},
};

/// Lets the keys whose names begin with `name` be older than they may become.
async fn age(pool: &PgPool, name: &str) {
    let statement =
        "UPDATE loms.idempotency_key SET created_at = now() - interval '7 days 1 minute'
                     WHERE key LIKE $1 || '%'";
    let aged = sqlx::query(statement).bind(name).execute(pool).await;
    assert!(
        aged.expect("an update").rows_affected() > 0,
        "no key {name}"
    );
}

/// Lets a key be too old, and waits until the sweeper has come by.
async fn be_swept(pool: &PgPool, key: &str) {
    age(pool, key).await;
    eventually("a sweep", async || {
        !keys(pool).await.iter().any(|there| there == key)
    })
    .await;
}

async fn keys(db: &PgPool) -> Vec<String> {
    let found = rows(db, "SELECT key FROM loms.idempotency_key ORDER BY key").await;
    found.into_iter().map(|(key,)| key).collect()
}

/// Claims a key of user 1, as a placer in the middle of its batch does.
async fn claim(pool: &PgPool, key: &str) -> Transaction<'static, Postgres> {
    let mut claim = pool.begin().await.expect("a connection");
    let statement = "INSERT INTO loms.idempotency_key VALUES (1, $1, '', 1)";
    let claimed = sqlx::query(statement).bind(key).execute(&mut *claim).await;
    claimed.expect("a free key");
    claim
}

/// Waits until `many` batches wait for a key that somebody else has claimed.
async fn claims_that_wait(pool: &PgPool, many: i64) {
    eventually("claims that wait", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                       AND wait_event_type = 'Lock' AND query LIKE 'INSERT INTO loms.idempotency_key%'";
        oracle::count(pool, waiting).await == many
    })
    .await;
}

/// A replica that sweeps at once and often; `app` does not sweep again before the test is over.
async fn sweeper(pool: &PgPool, app: &TestApp) -> TestApp {
    let keys = json!({"sweep_every": "20ms", "sweep_batch": 4});
    TestApp::start(pool, json!({"kafka": {"topic": app.topic}, "keys": keys})).await
}

/// The order of user 1 and one unit of SKU 7.
async fn place(app: &TestApp, key: &str) -> i64 {
    let placed = app.try_create(order(1, &[(7, 1)], key)).await;
    placed.expect("an order").order_id
}

#[tokio::test]
async fn old_keys_go_in_small_batches_and_young_ones_stay() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    for n in 0..30 {
        place(&app, &format!("old-{n}")).await;
    }
    let (first, young) = (place(&app, "old-x").await, place(&app, "young").await);
    age(&pool, "old").await;
    let almost = "UPDATE loms.idempotency_key SET created_at = now() - interval '6 days 23 hours' WHERE key = 'young'";
    oracle::run(&pool, almost).await;
    // who deleted how many at once
    oracle::run(
        &pool,
        "CREATE TABLE public.swept (keys bigint);
         CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO public.swept SELECT count(*) FROM gone; RETURN NULL; END $$;
         CREATE TRIGGER note AFTER DELETE ON loms.idempotency_key REFERENCING OLD TABLE AS gone
             FOR EACH STATEMENT EXECUTE FUNCTION public.note()",
    )
    .await;
    // one that somebody else is sweeping keeps nobody waiting
    let held = sit_on(&pool, "loms.idempotency_key WHERE key = 'old-7'").await;
    let sweepers = [sweeper(&pool, &app).await, sweeper(&pool, &app).await];
    eventually("all but the held one", async || {
        keys(&pool).await == ["old-7", "young"]
    })
    .await;
    held.rollback().await.unwrap();
    eventually("the held one", async || keys(&pool).await == ["young"]).await;
    let most = "SELECT max(keys) FROM public.swept";
    assert_eq!(oracle::count(&pool, most).await, 4);
    let all = "SELECT sum(keys)::bigint FROM public.swept";
    assert_eq!(oracle::count(&pool, all).await, 31);

    // the promise is over: the same key is a new order; the young one still is the same
    assert_eq!(place(&app, "young").await, young);
    assert!(place(&app, "old-x").await > first);
    for sweeper in sweepers {
        sweeper.stop().await.unwrap();
    }
    app.finish().await;
}

#[tokio::test]
async fn a_claim_waits_for_the_sweep_of_its_key() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    let first = place(&app, "a").await;
    let delete = async |db: &mut PgConnection| {
        let delete = "DELETE FROM loms.idempotency_key WHERE key = 'a'";
        sqlx::query(delete).execute(db).await.unwrap();
    };
    // a sweep that comes to nothing has swept nothing
    let mut sweep = pool.begin().await.unwrap();
    delete(&mut sweep).await;
    let undone = async {
        lock_waiters(&pool, 1).await;
        sweep.rollback().await.unwrap();
    };
    let (same, ()) = tokio::join!(place(&app, "a"), undone);
    assert_eq!(same, first);

    let mut sweep = pool.begin().await.unwrap();
    delete(&mut sweep).await;
    let done = async {
        lock_waiters(&pool, 1).await;
        sweep.commit().await.unwrap();
    };
    let (new, ()) = tokio::join!(place(&app, "a"), done);
    assert!(new > first, "{new}");
    assert_eq!(place(&app, "a").await, new);
    app.finish().await;
    no_deadlocks(&pool).await;
}

#[tokio::test]
async fn a_key_that_is_swept_between_its_claim_and_the_look_at_its_owner_is_claimed_again() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let sweeper = sweeper(&pool, &app).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    let first = place(&app, "a").await;
    // keys are claimed in order: `a` is taken, then the claim waits for whoever has `m`
    let (shelf, held) = (sit_on(&pool, "loms.stock").await, claim(&pool, "m").await);
    let batch = async {
        lock_waiters(&pool, 1).await;
        let release = async {
            arrived(&app).await;
            shelf.rollback().await.unwrap();
            claims_that_wait(&pool, 1).await;
            be_swept(&pool, "a").await;
            held.rollback().await.unwrap();
        };
        tokio::join!(place(&app, "m"), place(&app, "a"), release)
    };
    let (_, (other, new, ())) = tokio::join!(place(&app, "x"), batch);
    assert!(new > first && other != new, "{first} {other} {new}");
    assert_eq!(place(&app, "a").await, new);
    sweeper.stop().await.unwrap();
    app.finish().await;
    no_deadlocks(&pool).await;
}

#[tokio::test]
async fn two_batches_that_want_a_swept_key_do_not_deadlock() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let replica = sweeper(&pool, &app).await;
    app.receive("d1", &[(1, 7, 100), (1, 8, 1)]).await.unwrap();
    let first = place(&app, "a").await;
    // each placer has an order that waits for a shelf of its own, and a batch gathers behind it
    let shelf = sit_on(&pool, "loms.stock WHERE sku = 7").await;
    let other_shelf = sit_on(&pool, "loms.stock WHERE sku = 8").await;
    let held = claim(&pool, "m").await;
    let one = [(7, 1)];
    let script = async {
        lock_waiters(&pool, 2).await;
        let batch = async { tokio::join!(place(&app, "a"), place(&app, "b"), place(&app, "m")) };
        let later = async { tokio::join!(place(&replica, "a"), place(&replica, "b")) };
        let release = async {
            arrived(&app).await;
            arrived(&replica).await;
            // the first batch finds `a` taken, wins `b`, waits for `m`
            shelf.rollback().await.unwrap();
            claims_that_wait(&pool, 1).await;
            be_swept(&pool, "a").await;
            // the second wins `a` and waits for `b`; then the first wants `a` after all
            other_shelf.rollback().await.unwrap();
            claims_that_wait(&pool, 2).await;
            held.rollback().await.unwrap();
        };
        tokio::join!(batch, later, release)
    };
    let (_, _, ((a, b, m), (a_too, b_too), ())) =
        tokio::join!(app.create(2, &one), replica.create(3, &[(8, 1)]), script);
    assert_eq!((a, b), (a_too, b_too));
    assert!(a > first && m != a && m != b, "{first}: {a} {b} {m}");
    let placed = "SELECT count(*) FROM loms.user_order WHERE user_id = 1";
    assert_eq!(oracle::count(&pool, placed).await, 4);
    replica.stop().await.unwrap();
    app.finish().await;
    no_deadlocks(&pool).await;
}
