//! What `checkout import` reads from the tables of the system before, whose types it does not know,
//! and what it writes.

use std::collections::BTreeMap;

use platform::{import::Source, pg::Db};

use crate::import::CartRow;

/// The next carts with numbers above `after`, with their lines, of one moment.
pub(crate) async fn read_carts(
    source: &mut Source,
    after: Option<i64>,
) -> anyhow::Result<Vec<CartRow>> {
    let limit = source.slice();
    let mut tx = source.snapshot().await?;
    let rows: Vec<(i64, i64)> = sqlx::query_as(
        "SELECT id::bigint, coalesce(user_id, 0)::bigint FROM public.cart
         WHERE $1::bigint IS NULL OR id > $1 ORDER BY id LIMIT $2",
    )
    .bind(after)
    .bind(limit)
    .fetch_all(&mut *tx)
    .await?;
    let (Some(&(first, _)), Some(&(last, _))) = (rows.first(), rows.last()) else {
        return Ok(Vec::new());
    };
    let items: Vec<(i64, i64, i64)> = sqlx::query_as(
        "SELECT cart_id::bigint, coalesce(sku, 0)::bigint, sum(coalesce(count, 0))::bigint FROM public.cart_item
         WHERE cart_id BETWEEN $1 AND $2 GROUP BY 1, 2 ORDER BY 1, 2",
    )
    .bind(first)
    .bind(last)
    .fetch_all(&mut *tx)
    .await?;
    tx.rollback().await?;
    let mut lines: BTreeMap<i64, Vec<(i64, i64)>> = BTreeMap::new();
    for (cart, sku, units) in items {
        lines.entry(cart).or_default().push((sku, units));
    }
    let carts = rows.into_iter().map(|(id, user)| CartRow {
        id,
        user,
        lines: lines.remove(&id).unwrap_or_default(),
    });
    Ok(carts.collect())
}

/// Lines of carts that are not there.
pub(crate) async fn count_stray_lines(source: &mut Source) -> anyhow::Result<i64> {
    let mut tx = source.snapshot().await?;
    let stray = sqlx::query_scalar(
        "SELECT count(*) FROM public.cart_item i
         WHERE NOT EXISTS (SELECT FROM public.cart c WHERE c.id = i.cart_id)",
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.rollback().await?;
    Ok(stray)
}

/// Whether there are carts already.
pub(crate) async fn has_carts(db: &mut Db) -> sqlx::Result<bool> {
    sqlx::query_scalar!(r#"SELECT EXISTS (SELECT FROM checkout.cart) AS "there!""#)
        .fetch_one(db)
        .await
}

/// No cart gets a number that the system before has given.
pub(crate) async fn raise_cart_numbers(db: &mut Db, highest: i64) -> sqlx::Result<()> {
    sqlx::query!(
        r#"SELECT setval('checkout.cart_id_seq', greatest($1, last_value)) FROM checkout.cart_id_seq
           WHERE $1::bigint > 0"#,
        highest
    )
    .fetch_optional(db)
    .await?;
    Ok(())
}

/// Writes carts, with the numbers that they have, and their lines.
pub(crate) async fn insert_carts(db: &mut Db, carts: &[CartRow]) -> sqlx::Result<()> {
    let ids: Vec<i64> = carts.iter().map(|cart| cart.id).collect();
    let users: Vec<i64> = carts.iter().map(|cart| cart.user).collect();
    sqlx::query!(
        r#"INSERT INTO checkout.cart (id, user_id) OVERRIDING SYSTEM VALUE
           SELECT * FROM UNNEST($1::bigint[], $2::bigint[])"#,
        &ids,
        &users
    )
    .execute(&mut *db)
    .await?;
    let (mut owners, mut skus, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for cart in carts {
        for &(sku, units) in &cart.lines {
            owners.push(cart.id);
            skus.push(sku);
            counts.push(units);
        }
    }
    sqlx::query!(
        r#"INSERT INTO checkout.cart_item (cart_id, sku, count)
           SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::bigint[])"#,
        &owners,
        &skus,
        &counts
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Calls are planned for tables that are no longer empty.
pub(crate) async fn analyze(db: &mut Db) -> sqlx::Result<()> {
    sqlx::query!("ANALYZE checkout.cart, checkout.cart_item")
        .execute(db)
        .await?;
    Ok(())
}
