//! The service against a model of it: chance draws what is done, the model says what must be answered and what must be in
//! the tables, to the unit and the warehouse. A sequence that differs is shrunk to the shortest that still does.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner},
};
use proto::loms::{CreateOrderResponse, ListOrderRequest, ListOrderResponse};
use serde_json::json;
use sqlx::PgPool;
use tokio::runtime::Handle;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    shop::{Refusal, Shelves, Shop},
    test_app::{Lure, TestApp, eventually, order, scale, seed},
};

/// What can be done. SKUs, keys, deliveries and orders are numbered within a case.
#[derive(Clone, Debug)]
enum Op {
    Create(Vec<(u32, u32)>, Option<u8>),
    /// The request of a key once more, its lines from the end.
    Again(u8),
    Pay(usize),
    Cancel(usize),
    /// Its time for payment is over.
    Expire(usize),
    Receive(u8, Vec<(i64, u32, u64)>),
    List(usize),
    Stocks(u32),
}

const SKUS: u32 = 4;

fn op() -> impl Strategy<Value = Op> {
    // the last is one that nobody ever delivers
    let sku = || prop_oneof![12 => 1..=SKUS, 1 => Just(SKUS + 1)];
    let lines = move || vec((sku(), 1_u32..10), 1..=3);
    let delivery = vec((1_i64..=3, 1..=SKUS, 1_u64..20), 1..=6);
    prop_oneof![
        4 => lines().prop_map(|lines| Op::Create(lines, None)),
        2 => (lines(), 0_u8..4).prop_map(|(lines, key)| Op::Create(lines, Some(key))),
        1 => (0_u8..4).prop_map(Op::Again),
        3 => any::<usize>().prop_map(Op::Pay),
        3 => any::<usize>().prop_map(Op::Cancel),
        1 => any::<usize>().prop_map(Op::Expire),
        4 => (0_u8..20, delivery).prop_map(|(id, lines)| Op::Receive(id, lines)),
        1 => any::<usize>().prop_map(Op::List),
        1 => sku().prop_map(Op::Stocks),
    ]
}

/// A sequence at work: the model, and where the service has its things.
struct Case<'a> {
    app: &'a TestApp,
    pool: &'a PgPool,
    /// SKUs begin above it and its user has this number, so that no case meets another.
    number: u32,
    shop: Shop,
    /// The service's numbers of the model's orders.
    ids: Vec<i64>,
}

type Checked = Result<(), TestCaseError>;

impl Case<'_> {
    async fn run(app: &TestApp, pool: &PgPool, number: u32, ops: &[Op]) -> Checked {
        let (shop, ids) = Default::default();
        let mut case = Case {
            app,
            pool,
            number: number * 10,
            shop,
            ids,
        };
        for (n, op) in ops.iter().enumerate() {
            let done = case.step(op).await;
            let checked = match done {
                Ok(()) => case.check_tables().await,
                wrong => wrong,
            };
            checked
                .map_err(|wrong| TestCaseError::fail(format!("step {}, {op:?}: {wrong}", n + 1)))?;
        }
        for index in 0..case.shop.orders.len() {
            case.list(index).await?;
        }
        Ok(())
    }

    async fn step(&mut self, op: &Op) -> Checked {
        match op {
            Op::Create(lines, key) => self.create(lines, *key).await,
            Op::Again(key) => match self.shop.keys.get(key).cloned() {
                Some((mut lines, _)) => {
                    lines.reverse();
                    self.create(&lines, Some(*key)).await
                }
                None => Ok(()),
            },
            Op::Pay(any) => {
                let (index, id) = self.order(*any);
                let expected = self.shop.end(index, "payed", "user");
                same(expected, self.app.pay(id).await)
            }
            Op::Cancel(any) => {
                let (index, id) = self.order(*any);
                let expected = self.shop.end(index, "cancelled", "user");
                same(expected, self.app.cancel(id).await)
            }
            Op::Expire(any) => self.expire(*any).await,
            Op::Receive(delivery, lines) => {
                let expected = self.shop.receive(*delivery, lines);
                let named: Vec<_> = lines
                    .iter()
                    .map(|&(warehouse, sku, units)| (warehouse, self.sku(sku), units))
                    .collect();
                let id = format!("{}-{delivery}", self.number);
                same(expected, self.app.receive(&id, &named).await)
            }
            Op::List(any) => self.list(self.order(*any).0).await,
            Op::Stocks(sku) => {
                prop_assert_eq!(
                    self.app.stocks(self.sku(*sku)).await,
                    self.shop.stocks(*sku)
                );
                Ok(())
            }
        }
    }

    fn sku(&self, sku: u32) -> u32 {
        self.number + sku
    }

    /// One of the orders, or one that is not there: its number in the model, and in the service.
    fn order(&self, any: usize) -> (usize, i64) {
        let index = any % (self.ids.len() + 1);
        (index, self.ids.get(index).copied().unwrap_or(i64::MAX))
    }

    async fn create(&mut self, lines: &[(u32, u32)], key: Option<u8>) -> Checked {
        let expected = self.shop.create(lines, key);
        let items: Vec<_> = lines
            .iter()
            .map(|&(sku, units)| (self.sku(sku), units))
            .collect();
        let key = key.map_or_else(String::new, |key| format!("key-{key}"));
        let answer = self
            .app
            .try_create(order(self.number.into(), &items, &key))
            .await;
        if let (Ok(index), Ok(answer)) = (&expected, &answer) {
            if *index == self.ids.len() {
                prop_assert!(
                    !self.ids.contains(&answer.order_id),
                    "another order's number"
                );
                self.ids.push(answer.order_id);
            }
            let found = &self.shop.orders[*index];
            let shortages =
                found
                    .shortages
                    .iter()
                    .map(|&(sku, requested, available)| proto::loms::Shortage {
                        sku: self.sku(sku),
                        requested,
                        available,
                    });
            let expected = CreateOrderResponse {
                order_id: self.ids[*index],
                status: found.status().into(),
                shortages: shortages.collect(),
            };
            prop_assert_eq!(answer, &expected);
        }
        same(expected.map(drop), answer.map(drop))
    }

    async fn expire(&mut self, any: usize) -> Checked {
        let (index, id) = self.order(any);
        let waits = self
            .shop
            .orders
            .get(index)
            .is_some_and(|order| order.status() == "awaiting payment");
        let due = "UPDATE loms.unpaid_order SET payment_deadline = now() WHERE order_id = $1";
        let done = sqlx::query(due).bind(id).execute(self.pool).await;
        prop_assert_eq!(done.expect("a statement").rows_affected(), u64::from(waits));
        if waits {
            // refused already, whether the sweeper has come by or not
            same(Err((Code::FailedPrecondition, "")), self.app.pay(id).await)?;
            eventually("the sweeper", async || {
                let waits = "SELECT EXISTS (SELECT FROM loms.unpaid_order WHERE order_id = $1)";
                let waits: bool = sqlx::query_scalar(waits)
                    .bind(id)
                    .fetch_one(self.pool)
                    .await
                    .expect("a row");
                !waits
            })
            .await;
            self.shop
                .end(index, "cancelled", "timeout")
                .expect("it waits");
        }
        Ok(())
    }

    async fn list(&self, index: usize) -> Checked {
        let order_id = self.ids.get(index).copied().unwrap_or(i64::MAX);
        let answer = self
            .app
            .grpc
            .clone()
            .list_order(ListOrderRequest { order_id })
            .await;
        let Some(expected) = self.shop.orders.get(index) else {
            return same(Err((Code::NotFound, "")), answer.map(drop));
        };
        let ListOrderResponse {
            status,
            user,
            items,
            payment_deadline,
            history,
            created_at,
        } = answer.expect("an order").into_inner();
        prop_assert_eq!(
            (status.as_str(), user),
            (expected.status(), i64::from(self.number))
        );
        let items = items
            .iter()
            .map(|item| (item.sku - self.number, item.count));
        prop_assert_eq!(items.collect::<BTreeMap<_, _>>(), expected.lines.clone());
        prop_assert_eq!(payment_deadline.is_some(), status == "awaiting payment");
        let steps: Vec<_> = history
            .iter()
            .map(|step| (step.status.as_str(), step.actor.as_str()))
            .collect();
        prop_assert_eq!(&steps, &expected.history);
        prop_assert_eq!(created_at, history[0].at);
        // each step begins where the one before it ended
        let froms = history.iter().map(|step| step.from_status.as_str());
        let ends = std::iter::once("").chain(steps.iter().map(|(status, _)| *status));
        prop_assert!(froms.eq(ends.take(steps.len())));
        prop_assert!(
            history
                .iter()
                .map(|step| step.sequence)
                .eq(1..=steps.len() as u32)
        );
        Ok(())
    }

    /// Where every unit of the case is.
    async fn check_tables(&self) -> Checked {
        let shelves: Vec<(i64, i64, i64)> = sqlx::query_as(
            "SELECT sku - $1, warehouse_id, count FROM loms.stock WHERE sku BETWEEN $1 AND $1 + 9",
        )
        .bind(i64::from(self.number))
        .fetch_all(self.pool)
        .await
        .expect("rows");
        let shelves = shelves
            .into_iter()
            .map(|(sku, warehouse, units)| ((sku as u32, warehouse), units as u64));
        prop_assert_eq!(shelves.collect::<Shelves>(), self.shop.shelves.clone());
        for (table, status) in [
            ("reservation_stock", "awaiting payment"),
            ("write_off", "payed"),
        ] {
            let statement = format!(
                "SELECT order_id, sku - $1, warehouse_id, count FROM loms.{table}
                 WHERE sku BETWEEN $1 AND $1 + 9 ORDER BY order_id, sku, warehouse_id"
            );
            let held: Vec<(i64, i64, i64, i64)> = sqlx::query_as(sqlx::AssertSqlSafe(statement))
                .bind(i64::from(self.number))
                .fetch_all(self.pool)
                .await
                .expect("rows");
            let expected = self.shop.units_in(status).into_iter();
            let expected = expected.map(|(index, (sku, warehouse), units)| {
                (self.ids[index], i64::from(sku), warehouse, units as i64)
            });
            prop_assert_eq!(held, expected.collect::<Vec<_>>(), "{}", table);
        }
        Ok(())
    }
}

/// The answer is the model's: the same, or refused with the same code and reason.
fn same<T: PartialEq + std::fmt::Debug>(
    expected: Result<T, Refusal>,
    answer: Result<T, Status>,
) -> Checked {
    let answer = answer.map_err(|status| {
        let reason = status
            .get_details_error_info()
            .map_or_else(String::new, |info| info.reason);
        (status.code(), reason)
    });
    let expected = expected.map_err(|(code, reason)| (code, reason.to_owned()));
    prop_assert_eq!(answer, expected);
    Ok(())
}

#[tokio::test]
async fn whatever_is_done_is_answered_as_the_model_says() {
    let pool = crate::database().await;
    let config = Config {
        cases: 24 * scale() as u32,
        rng_seed: RngSeed::Fixed(seed()),
        max_shrink_iters: 2_000,
        // the seed is the way to repeat it
        failure_persistence: None,
        ..Config::default()
    };
    let app = Arc::new(TestApp::start(&pool, json!({})).await);
    app.receive("lure", &[(1, 7, 1)]).await.unwrap();
    let lure = Lure::set(&app).await;
    let (served, tables, here) = (app.clone(), pool.clone(), Handle::current());
    let runs = move || {
        let numbers = AtomicU32::new(1);
        TestRunner::new(config).run(&vec(op(), 1..40), |ops| {
            let number = numbers.fetch_add(1, Ordering::Relaxed);
            here.block_on(Case::run(&served, &tables, number, &ops))
        })
    };
    // proptest knows no async: it runs beside, and what it does runs here
    match tokio::task::spawn_blocking(runs).await.expect("an end") {
        Ok(()) => {}
        Err(TestError::Fail(why, shortest)) => panic!("{why}\nshortest: {shortest:?}"),
        Err(stopped) => panic!("{stopped}"),
    }
    lure.let_go(&app).await;
    Arc::into_inner(app)
        .expect("the last handle")
        .finish()
        .await;
}
