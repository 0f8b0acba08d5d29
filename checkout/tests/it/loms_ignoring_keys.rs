//! LOMS on the wire as the system before has it: it knows neither keys nor AbandonOrder.

use std::net::SocketAddr;

use pbjson_types::Empty;
use proto::loms::{self as pb, loms_server as server};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

use crate::loms_stub::{LomsStub, Mood};

impl LomsStub {
    /// The same orders and stock at another address, served as the system before does.
    pub(crate) async fn ignoring_keys(&self, serving: &mut JoinSet<()>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(server::LomsServer::new(IgnoresKeys(self.clone())))
            .serve_with_incoming(TcpIncoming::from(listener));
        serving.spawn(async move { server.await.unwrap() });
        address
    }
}

/// Answers as the system before does: a CreateOrder is another order, whatever its key, and its
/// answer has no status; a CancelOrder gives stock back, as often as it comes.
struct IgnoresKeys(LomsStub);

#[tonic::async_trait]
impl server::Loms for IgnoresKeys {
    async fn create_order(
        &self,
        request: Request<pb::CreateOrderRequest>,
    ) -> Result<Response<pb::CreateOrderResponse>, Status> {
        let mut request = request.into_inner();
        request.idempotency_key = format!("ignored-{}", self.0.orders().len());
        let leaves_new = self.0.mood_now() == Mood::LeavesNew;
        let placed = self.0.create_order(Request::new(request)).await?;
        let order_id = placed.into_inner().order_id;
        if leaves_new {
            self.0.set_status(order_id, "new");
        }
        Ok(Response::new(pb::CreateOrderResponse {
            order_id,
            ..Default::default()
        }))
    }

    async fn list_order(
        &self,
        request: Request<pb::ListOrderRequest>,
    ) -> Result<Response<pb::ListOrderResponse>, Status> {
        self.0.list_order(request).await
    }

    async fn order_payed(
        &self,
        request: Request<pb::OrderPayedRequest>,
    ) -> Result<Response<Empty>, Status> {
        self.0.order_payed(request).await
    }

    async fn cancel_order(
        &self,
        request: Request<pb::CancelOrderRequest>,
    ) -> Result<Response<Empty>, Status> {
        self.0.behave().await?;
        let order = self.0.find(request.into_inner().order_id)?;
        self.0.set_status(order.id, "cancelled");
        for (sku, count) in order.lines {
            self.0.stock(sku, self.0.on_sale(sku) + u64::from(count));
        }
        match self.0.mood_now() {
            Mood::LosesAnswers => Err(Status::unavailable("lost")),
            _ => Ok(Response::new(Empty {})),
        }
    }

    async fn stocks(
        &self,
        request: Request<pb::StocksRequest>,
    ) -> Result<Response<pb::StocksResponse>, Status> {
        self.0.stocks(request).await
    }

    async fn receive_stock(
        &self,
        request: Request<pb::ReceiveStockRequest>,
    ) -> Result<Response<pb::ReceiveStockResponse>, Status> {
        self.0.receive_stock(request).await
    }

    async fn abandon_order(
        &self,
        _: Request<pb::AbandonOrderRequest>,
    ) -> Result<Response<pb::AbandonOrderResponse>, Status> {
        Err(Status::unimplemented("unknown method AbandonOrder"))
    }
}
