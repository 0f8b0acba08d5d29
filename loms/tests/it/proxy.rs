//! A TCP proxy that can be cut, or go silent: what stands behind it is then away, and later back.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::{
    net::{TcpSocket, TcpStream},
    sync::watch,
    task::JoinSet,
};

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    target: String,
    /// Bound and not listening: the port is ours, and whoever connects is refused.
    closed: Option<TcpSocket>,
    running: JoinSet<()>,
    /// How often it went silent.
    silenced: watch::Sender<u32>,
}

impl Proxy {
    /// Nobody listens there before [`Proxy::open`].
    pub(crate) fn closed(target: &str) -> Proxy {
        let socket = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        Proxy {
            address: socket.local_addr().expect("an address"),
            target: target.to_owned(),
            closed: Some(socket),
            running: JoinSet::new(),
            silenced: watch::Sender::new(0),
        }
    }

    pub(crate) fn open(&mut self) {
        let socket = self.closed.take().expect("a closed proxy");
        let listener = socket.listen(64).expect("a listener");
        let target = self.target.clone();
        let silenced = self.silenced.subscribe();
        self.running.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let (target, mut silenced) = (target.clone(), silenced.clone());
                connections.spawn(async move {
                    let before = *silenced.borrow();
                    let Ok(mut far) = TcpStream::connect(target).await else {
                        return;
                    };
                    tokio::select! {
                        // an end that breaks off ends the connection, as it would without a proxy
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = async { silenced.wait_for(|now| *now > before).await.is_ok() } => std::future::pending().await,
                    }
                });
            }
        });
    }

    /// Lets every connection that there is hang: open, and nothing comes through. New ones are served.
    pub(crate) fn silence(&self) {
        self.silenced.send_modify(|times| *times += 1);
    }

    /// Ends every connection and refuses new ones.
    pub(crate) async fn cut(&mut self) {
        self.running.shutdown().await;
        self.closed = Some(bind(self.address));
    }
}

fn bind(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("an option");
    socket.bind(address).expect("a port");
    socket
}
