//! An etcd that asks who one is. Shared with the tests in namespaces.

use etcd_client::{Client, ConnectOptions, Error, Permission, PermissionType};

/// Where flannel keeps its network.
const PREFIX: &str = "/coreos.com/network";

/// Whether etcd is to ask everybody: then `KERSEY_TEST_ETCD_AUTH` is set.
pub(crate) fn wanted() -> bool {
    std::env::var_os("KERSEY_TEST_ETCD_AUTH").is_some()
}

/// Who a daemon is there; its password is the same.
pub(crate) const USER: &str = "kersey";

/// What it is told of that.
pub(crate) const FLAGS: [&str; 2] = ["--etcd-username=kersey", "--etcd-password=kersey"];

/// The operator's client; root's, if etcd is to ask.
pub(crate) async fn connect(place: String) -> Result<Client, Error> {
    if wanted() {
        return as_root(place).await;
    }
    Client::connect([place], None).await
}

/// Root's client; nobody's, as long as etcd does not ask.
pub(crate) async fn as_root(place: String) -> Result<Client, Error> {
    let root = ConnectOptions::new()
        .with_user("root", "root")
        .with_auto_token_refresh(true);
    match Client::connect([place.clone()], Some(root)).await {
        Err(Error::GRpcStatus(status)) if status.message().contains("authentication is not enabled") => {
            Client::connect([place], None).await
        }
        connected => connected,
    }
}

/// Has etcd ask, if it does not yet: for root, who may do everything, and for the daemons' user, who has what the
/// documentation says is enough.
pub(crate) async fn ask_for(mut client: Client) -> Result<(), Error> {
    match client.role_add("node").await {
        // It has been asked before, and what it knows survived.
        Err(Error::GRpcStatus(status)) if status.message().contains("already exists") => return Ok(()),
        added => added?,
    };
    for (kind, keys) in [
        (PermissionType::Read, ""),
        (PermissionType::Readwrite, "subnets/"),
        (PermissionType::Readwrite, "kersey/nodes/"),
    ] {
        let right = Permission::new(kind, format!("{PREFIX}/{keys}")).with_prefix();
        client.role_grant_permission("node", right).await?;
    }
    for (user, role) in [("root", "root"), (USER, "node")] {
        client.user_add(user, user, None).await?;
        client.user_grant_role(user, role).await?;
    }
    client.auth_enable().await.map(drop)
}
