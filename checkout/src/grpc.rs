//! The RPCs: parse, one use case, reply. All that is wrong with a request is said at once.

use platform::{
    error::{Fields, Violation},
    grpc::Deadline,
};
use proto::cart::{
    AddToCartRequest, CartGoodInfo, DeleteFromCartRequest, ListCartRequest, ListCartResponse,
    PurchaseRequest, PurchaseResponse, cart_server::Cart,
};
use tonic::{Request, Response, Status};

use crate::{
    cart::{Line, Quantity, Sku, UserId},
    carts::Carts,
    error::Error,
    purchase::IdempotencyKey,
    purchases::Purchases,
};

/// `cart.Cart` over the use cases.
#[derive(Clone)]
pub struct CartService {
    carts: Carts,
    purchases: Purchases,
}

impl CartService {
    /// Serves these use cases.
    pub fn new(carts: Carts, purchases: Purchases) -> Self {
        Self { carts, purchases }
    }
}

#[tonic::async_trait]
impl Cart for CartService {
    async fn add_to_cart(
        &self,
        request: Request<AddToCartRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let deadline = Deadline::of(&request);
        let AddToCartRequest { user, sku, count } = request.into_inner();
        let (user, line) = parse_line(user, sku, count)?;
        self.carts.add(user, line, deadline).await?;
        Ok(Response::new(pbjson_types::Empty {}))
    }

    async fn delete_from_cart(
        &self,
        request: Request<DeleteFromCartRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let deadline = Deadline::of(&request);
        let DeleteFromCartRequest { user, sku, count } = request.into_inner();
        let (user, line) = parse_line(user, sku, count)?;
        self.carts.delete(user, line, deadline).await?;
        Ok(Response::new(pbjson_types::Empty {}))
    }

    async fn list_cart(
        &self,
        request: Request<ListCartRequest>,
    ) -> Result<Response<ListCartResponse>, Status> {
        let deadline = Deadline::of(&request);
        let user = parse_user(request.into_inner().user)?;
        let contents = self.carts.list(user, deadline).await?;
        let items = contents.lines.iter().map(|(line, product)| CartGoodInfo {
            sku: line.sku.get(),
            count: line.quantity.get(),
            name: product.name.clone(),
            price: product.price,
        });
        Ok(Response::new(ListCartResponse {
            items: items.collect(),
            total_price: contents.total,
        }))
    }

    async fn purchase(
        &self,
        request: Request<PurchaseRequest>,
    ) -> Result<Response<PurchaseResponse>, Status> {
        let deadline = Deadline::of(&request);
        let (user, key) = parse_purchase(request.into_inner())?;
        let order = self.purchases.purchase(user, key, deadline).await?;
        tracing::Span::current().record("order.id", order.0);
        Ok(Response::new(PurchaseResponse { order_id: order.0 }))
    }
}

fn parse_line(user: i64, sku: u32, count: u32) -> Result<(UserId, Line), Error> {
    let mut fields = Fields::new();
    let user = user_field(&mut fields, user);
    let sku = required(&mut fields, Sku::new(sku), "sku", "must not be 0");
    let quantity = required(
        &mut fields,
        Quantity::new(count),
        "count",
        "must be 1 to 65535",
    );
    let parsed = user.zip(sku).zip(quantity);
    checked(
        fields,
        parsed.map(|((user, sku), quantity)| (user, Line { sku, quantity })),
    )
}

fn parse_user(user: i64) -> Result<UserId, Error> {
    let mut fields = Fields::new();
    let user = user_field(&mut fields, user);
    checked(fields, user)
}

fn parse_purchase(request: PurchaseRequest) -> Result<(UserId, Option<IdempotencyKey>), Error> {
    let mut fields = Fields::new();
    let user = user_field(&mut fields, request.user);
    // an empty string is an absent field to proto3
    let key = (!request.idempotency_key.is_empty()).then(|| {
        let key = IdempotencyKey::new(request.idempotency_key);
        required(
            &mut fields,
            key,
            "idempotency_key",
            "must be 1 to 128 printable ASCII characters",
        )
    });
    checked(fields, user.map(|user| (user, key.flatten())))
}

fn user_field(fields: &mut Fields, user: i64) -> Option<UserId> {
    let user = UserId::new(user);
    if let Some(user) = user {
        tracing::Span::current().record("user.id", user.get());
    }
    required(fields, user, "user", "must be positive")
}

fn required<T>(fields: &mut Fields, value: Option<T>, field: &str, rule: &str) -> Option<T> {
    fields.check(value.is_some(), field, rule);
    value
}

fn checked<T>(fields: Fields, parsed: Option<T>) -> Result<T, Error> {
    fields.finish().map_err(Error::Invalid)?;
    parsed.ok_or_else(|| {
        Error::Invalid(vec![Violation {
            field: String::new(),
            description: "invalid".to_owned(),
        }])
    })
}
