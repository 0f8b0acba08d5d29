//! `cart` and `cart_item`.

use platform::pg::Db;
use uuid::Uuid;

use super::{decode, line};
use crate::cart::{Holding, Line, Quantity, Sku, UserId};

/// Locks the user's cart, if there is one. The lock is what all decisions about one user queue on; it is taken before
/// anything else, and `NO KEY` because foreign keys that point here need not wait.
pub async fn lock_cart(conn: &mut Db, user: UserId) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar!(
        "SELECT id FROM checkout.cart WHERE user_id = $1 FOR NO KEY UPDATE",
        user.get()
    )
    .fetch_optional(conn)
    .await
}

/// Makes the user's cart unless there is one; a user's first calls may come together.
pub async fn create_cart(conn: &mut Db, user: UserId) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO checkout.cart (user_id) VALUES ($1) ON CONFLICT ON CONSTRAINT cart_user_id_key DO NOTHING",
        user.get()
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What adding units of `sku` depends on. Only under the cart's lock is it still true when it is used.
pub async fn read_holding(conn: &mut Db, cart_id: i64, sku: Sku) -> Result<Holding, sqlx::Error> {
    let row = sqlx::query!(
        r#"WITH open_line AS (
               SELECT item.sku, item.count
               FROM checkout.purchase
               JOIN checkout.purchase_item item ON item.purchase_id = purchase.id
               WHERE purchase.cart_id = $1 AND purchase.closed_at IS NULL
           )
           SELECT
               COALESCE((SELECT count FROM checkout.cart_item WHERE cart_id = $1 AND sku = $2), 0) AS "in_cart!",
               COALESCE((SELECT count FROM open_line WHERE sku = $2), 0) AS "in_purchase!",
               (SELECT count(*) FROM (
                   SELECT sku FROM checkout.cart_item WHERE cart_id = $1 UNION SELECT sku FROM open_line
               ) AS held) AS "skus!""#,
        cart_id,
        i64::from(sku.get())
    )
    .fetch_one(conn)
    .await?;
    let units =
        |count: i64| u32::try_from(count).map_err(|_| decode("units outside of their CHECK"));
    Ok(Holding {
        in_cart: units(row.in_cart)?,
        in_purchase: units(row.in_purchase)?,
        skus: u64::try_from(row.skus).unwrap_or_default(),
    })
}

/// Units of `sku` in the cart.
pub async fn read_units(
    conn: &mut Db,
    cart_id: i64,
    sku: Sku,
) -> Result<Option<Quantity>, sqlx::Error> {
    let count = sqlx::query_scalar!(
        "SELECT count FROM checkout.cart_item WHERE cart_id = $1 AND sku = $2",
        cart_id,
        i64::from(sku.get())
    )
    .fetch_optional(conn)
    .await?;
    count
        .map(|count| line(i64::from(sku.get()), count).map(|line| line.quantity))
        .transpose()
}

/// Makes the cart hold exactly this line of the SKU.
pub async fn put_line(conn: &mut Db, cart_id: i64, line: Line) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO checkout.cart_item (cart_id, sku, count) VALUES ($1, $2, $3)
         ON CONFLICT ON CONSTRAINT cart_item_pkey DO UPDATE SET count = EXCLUDED.count",
        cart_id,
        i64::from(line.sku.get()),
        i64::from(line.quantity.get())
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Takes the line of `sku` out of the cart.
pub async fn delete_line(conn: &mut Db, cart_id: i64, sku: Sku) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "DELETE FROM checkout.cart_item WHERE cart_id = $1 AND sku = $2",
        cart_id,
        i64::from(sku.get())
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The user's lines in the order of SKU, which callers rely on; without a lock, as reading decides nothing.
pub async fn list_lines(conn: &mut Db, user: UserId) -> Result<Vec<Line>, sqlx::Error> {
    sqlx::query!(
        "SELECT item.sku, item.count
         FROM checkout.cart JOIN checkout.cart_item item ON item.cart_id = cart.id
         WHERE cart.user_id = $1
         ORDER BY item.sku",
        user.get()
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(|row| line(row.sku, row.count))
    .collect()
}

/// Whether the cart holds nothing.
pub async fn is_empty(conn: &mut Db, cart_id: i64) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"SELECT NOT EXISTS (SELECT FROM checkout.cart_item WHERE cart_id = $1) AS "empty!""#,
        cart_id
    )
    .fetch_one(conn)
    .await
}

/// Moves every line of the cart into the purchase.
pub async fn move_lines_out(
    conn: &mut Db,
    cart_id: i64,
    purchase: Uuid,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "WITH moved AS (DELETE FROM checkout.cart_item WHERE cart_id = $1 RETURNING sku, count)
         INSERT INTO checkout.purchase_item (purchase_id, sku, count) SELECT $2, sku, count FROM moved",
        cart_id,
        purchase
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Gives the lines of a purchase back, merged with what was added since. It fits: units of an open purchase count for
/// the limits of `AddToCart`.
pub async fn give_lines_back(
    conn: &mut Db,
    cart_id: i64,
    purchase: Uuid,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO checkout.cart_item (cart_id, sku, count)
         SELECT $1, sku, count FROM checkout.purchase_item WHERE purchase_id = $2
         ON CONFLICT ON CONSTRAINT cart_item_pkey DO UPDATE SET count = cart_item.count + EXCLUDED.count",
        cart_id,
        purchase
    )
    .execute(conn)
    .await?;
    Ok(())
}
