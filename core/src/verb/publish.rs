//! The trained weights become the generators'.

use serde::{Deserialize, Serialize};

use super::{Verb, WorkerGroup};
use crate::data::Rows;
use crate::error::Result;

/// Make a trained role's weights the generators', as this version of the policy. The role's ranks and those of generators
/// with weights of their own answer it together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Publish {
    pub policy_version: u64,
}

impl Verb for Publish {
    const NAME: &'static str = "publish";
    type Reply = ();
}

impl WorkerGroup {
    /// Gives the generators the weights as they are now, as `policy_version`. Nothing is sent where they compute on this
    /// role's own tensors.
    pub async fn publish_weights(&self, generator: &WorkerGroup, policy_version: u64) -> Result<()> {
        if generator.follows_actor() {
            return self.publish(policy_version).await;
        }
        // Both ends of a collective: neither returns without the other.
        let (sent, received) =
            futures_util::future::join(self.publish(policy_version), generator.publish(policy_version)).await;
        sent.and(received)
    }

    /// Sends, or takes up what the other end sends at the same time.
    pub async fn publish(&self, policy_version: u64) -> Result<()> {
        self.call(Publish { policy_version }, Rows::default()).await
    }
}
