//! The system before, as an hour of load leaves its tables: it reserves line by line without a
//! transaction, so that orders are cut anywhere, reservations leak, and counts fall below 0.

use std::collections::BTreeMap;

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use sqlx::PgPool;

use crate::{oracle, test_app::eventually};

const TABLES: &str = "
    CREATE TYPE public.order_status AS ENUM ('new', 'payed', 'failed', 'awaiting payment', 'cancelled');
    CREATE TABLE public.user_order (id SERIAL PRIMARY KEY, user_id BIGINT NOT NULL, status public.order_status NOT NULL);
    CREATE TABLE public.order_item (order_id BIGINT NOT NULL, sku BIGINT NOT NULL, count INT NOT NULL, PRIMARY KEY (order_id, sku));
    CREATE TABLE public.stock (warehouse_id BIGINT NOT NULL, sku BIGINT NOT NULL, count INT NOT NULL, PRIMARY KEY (warehouse_id, sku));
    CREATE TABLE public.reservation_stock (order_id BIGINT NOT NULL, warehouse_id BIGINT NOT NULL, sku BIGINT NOT NULL,
                                           count INT NOT NULL, PRIMARY KEY (order_id, warehouse_id, sku));
    CREATE TABLE public.goose_db_version (id SERIAL PRIMARY KEY, version_id BIGINT NOT NULL, is_applied BOOLEAN NOT NULL);
    INSERT INTO public.goose_db_version (version_id, is_applied) VALUES (20230601000000, TRUE)";

const SKUS: i64 = 40;
const WAREHOUSES: i64 = 5;

/// The tables of the system before, empty.
pub(crate) async fn tables(pool: &PgPool) {
    oracle::run(pool, TABLES).await;
}

#[derive(Default)]
struct Shop {
    orders: Vec<(i64, i64, &'static str)>,
    items: Vec<[i64; 3]>,
    stock: BTreeMap<(i64, i64), i64>,
    reserved: BTreeMap<(i64, i64, i64), i64>,
}

impl Shop {
    /// CreateOrder, payment and cancellation as the system before does them, cut where chance has
    /// it.
    fn order(&mut self, id: i64, chance: &mut StdRng) {
        let user = chance.random_range(1..500);
        let mut lines: BTreeMap<i64, i64> = BTreeMap::new();
        for _ in 0..chance.random_range(1..4) {
            lines.insert(chance.random_range(1..=SKUS), chance.random_range(1..4));
        }
        // of some only the order itself was written
        if id > 1 && chance.random_ratio(1, 50) {
            return self.orders.push((id, user, "new"));
        }
        self.items
            .extend(lines.iter().map(|(&sku, &units)| [id, sku, units]));
        let mut taken = Vec::new();
        let mut status = "awaiting payment";
        for (&sku, &units) in &lines {
            if id > 1 && chance.random_ratio(1, 60) {
                status = *["new", "awaiting payment"].choose(chance).unwrap();
                break;
            }
            let places = (1..=WAREHOUSES).filter(|&place| self.stock.contains_key(&(place, sku)));
            let places: Vec<_> = places.collect();
            // two callers read the same count, both take it
            let slack = if chance.random_ratio(1, 20) { 3 } else { 0 };
            let free = |place: &&i64| self.stock[&(**place, sku)] + slack >= units;
            let Some(&place) = places.iter().find(free) else {
                status = "failed";
                break;
            };
            *self.stock.get_mut(&(place, sku)).unwrap() -= units;
            self.reserved.insert((id, place, sku), units);
            taken.push((place, sku, units));
        }
        if status == "awaiting payment" && id > 1 && chance.random_ratio(7, 10) {
            status = *["payed", "payed", "cancelled"].choose(chance).unwrap();
            for (place, sku, units) in taken {
                // the process died in between
                if chance.random_ratio(1, 40) {
                    break;
                }
                self.reserved.remove(&(id, place, sku));
                if status == "cancelled" {
                    *self.stock.get_mut(&(place, sku)).unwrap() += units;
                }
            }
        }
        self.orders.push((id, user, status));
    }

    async fn write(self, pool: &PgPool) {
        let orders = self.orders.iter();
        let (mut ids, mut users, mut statuses) = (Vec::new(), Vec::new(), Vec::new());
        for &(id, user, status) in orders {
            ids.push(id);
            users.push(user);
            statuses.push(status);
        }
        let insert = "INSERT INTO public.user_order SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::text[]::public.order_status[])";
        let insert = sqlx::query(insert).bind(ids).bind(users).bind(statuses);
        insert.execute(pool).await.unwrap();
        let items = self.items.into_iter();
        unnest(pool, "order_item (order_id, sku, count)", items).await;
        let stock = self.stock.into_iter();
        let stock = stock.map(|((place, sku), count)| [place, sku, count]);
        unnest(pool, "stock (warehouse_id, sku, count)", stock).await;
        let reserved = self.reserved.into_iter();
        let reserved = reserved.map(|((id, place, sku), units)| [id, place, sku, units]);
        let table = "reservation_stock (order_id, warehouse_id, sku, count)";
        unnest(pool, table, reserved).await;
    }
}

async fn unnest<const N: usize>(pool: &PgPool, table: &str, rows: impl Iterator<Item = [i64; N]>) {
    let mut columns = vec![Vec::new(); N];
    for row in rows {
        for (column, value) in columns.iter_mut().zip(row) {
            column.push(value);
        }
    }
    let arrays: Vec<_> = (1..=N).map(|n| format!("${n}::bigint[]")).collect();
    let insert = format!(
        "INSERT INTO public.{table} SELECT * FROM UNNEST({})",
        arrays.join(", ")
    );
    let mut insert = sqlx::query(sqlx::AssertSqlSafe(insert));
    for column in columns {
        insert = insert.bind(column);
    }
    insert.execute(pool).await.unwrap();
}

/// The tables after so many orders; order 1 awaits payment, and the numbers of the last ones were
/// given to orders that are no longer there. Whoever was connected has left.
pub(crate) async fn load(pool: &PgPool, seed: u64, orders: i64) {
    tables(pool).await;
    let mut chance = StdRng::seed_from_u64(seed);
    let mut shop = Shop::default();
    for sku in 1..=SKUS {
        for place in 1..=WAREHOUSES {
            if place == 1 || chance.random_ratio(2, 3) {
                let most = 1 + orders * 6 / SKUS / WAREHOUSES;
                shop.stock
                    .insert((place, sku), chance.random_range(0..=most) + 3);
            }
        }
    }
    for id in 1..=orders {
        shop.order(id, &mut chance);
    }
    shop.write(pool).await;
    let given =
        "SELECT setval('public.user_order_id_seq', (SELECT max(id) + 100 FROM public.user_order))";
    oracle::run(pool, given).await;
    // of an order that is not there
    oracle::run(
        pool,
        "INSERT INTO public.reservation_stock VALUES (1000000000, 1, 1, 2), (1000000000, 9, 1, 1)",
    )
    .await;
    oracle::run(
        pool,
        "UPDATE public.stock SET count = -4 WHERE warehouse_id = 1 AND sku = 2",
    )
    .await;
    oracle::run(pool, "ANALYZE").await;
    leave(pool).await;
}

/// Waits until the test's own connections have ended.
pub(crate) async fn leave(pool: &PgPool) {
    eventually("no connection of the test", async || pool.size() == 0).await;
}
