//! Messages by the store of a host: the same on the other side, where they lie, and gone when they were read.

use echelon_core::experience::Experience;
use echelon_core::message::kind_of_message;
use echelon_core::rollout::Tokens;
use echelon_core::shared_message::SharedMessages;
use echelon_core::store::{Store, StoreConfig, StoreServer};
use echelon_core::verb::{UpdateActor, Values};
use tch::{Device, Kind, Tensor};

const ROWS: i64 = 40;

fn request() -> UpdateActor {
    let of = |seed: f64| Tensor::rand([ROWS, 9], (Kind::Float, Device::Cpu)) + seed;
    let row = |n: i64| ((0..9).map(|t| 10 * n + t).collect(), (0..9).map(|t| t > 3).collect());
    let rows: Vec<_> = (0..ROWS).map(row).collect();
    let experience = Experience {
        tokens: Tokens::from_rows(&rows),
        old_logprobs: of(0.0),
        ref_logprobs: Some(of(1.0)),
        values: of(2.0),
        // Rows of another tensor: only these are sent.
        advantages: Tensor::rand([3 * ROWS, 9], (Kind::Float, Device::Cpu)).slice(0, 5, 5 + 2 * ROWS, 2),
        returns: of(4.0),
    };
    UpdateActor { experience, num_tokens: 200.0, kl_coef: 0.1 }
}

fn same(found: &UpdateActor, expected: &UpdateActor) {
    assert_eq!((found.num_tokens, found.kl_coef), (expected.num_tokens, expected.kl_coef));
    let (found, expected) = (&found.experience, &expected.experience);
    assert_eq!(found.tokens.token_ids, expected.tokens.token_ids);
    assert_eq!((&found.tokens.lengths, &found.tokens.mask), (&expected.tokens.lengths, &expected.tokens.mask));
    assert_eq!((&found.old_logprobs, &found.ref_logprobs), (&expected.old_logprobs, &expected.ref_logprobs));
    assert_eq!((&found.values, &found.advantages), (&expected.values, &expected.advantages));
    assert_eq!(found.returns, expected.returns);
}

#[test]
fn a_large_message_lies_in_the_store_and_a_small_one_goes_as_it_is() {
    let server = StoreServer::start(StoreConfig::new(1 << 20)).unwrap();
    let [driver, worker] = ["driver", "worker 3"].map(|name| Store::connect(server.address(), name).unwrap());
    let report = || driver.report().unwrap();
    let (from, to) = (SharedMessages::new(driver.clone(), 3, 8 << 10), SharedMessages::new(worker.clone(), 3, 8 << 10));

    let sent = request();
    let bytes = from.encode(&sent);
    assert!(bytes.len() < 512, "a place of {} bytes", bytes.len());
    assert_eq!(report().num_objects, 1);
    let error = to.decode::<Values>(&from.encode(&sent)).err().unwrap().to_string();
    assert!(error.contains("`values`") && error.contains("`update_actor`"), "{error}");
    let received: UpdateActor = to.decode(&bytes).unwrap();
    same(&received, &sent);
    assert_eq!(report().num_held, 1, "its tensors are the store's pages");
    drop(received);
    assert_eq!(report().num_objects, 0, "it was read");
    assert!(to.decode::<UpdateActor>(&bytes).is_err(), "and is read once");

    let unread = from.encode(&sent);
    from.forget(&unread);
    assert_eq!(report().used_bytes, 0);

    let small = Values { tokens: Tokens::from_rows(&[(vec![1, 2], vec![false, true])]) };
    let bytes = from.encode(&small);
    assert_eq!(kind_of_message(&bytes).as_deref(), Some("values"));
    assert_eq!(to.decode::<Values>(&bytes).unwrap().tokens.token_ids, small.tokens.token_ids);
}

#[test]
fn a_store_without_room_or_that_is_gone_sends_the_message_itself() {
    let server = StoreServer::start(StoreConfig::new(4 << 10)).unwrap();
    let store = Store::connect(server.address(), "driver").unwrap();
    let messages = SharedMessages::new(store, 0, 0);
    let sent = request();
    let full = messages.encode(&sent);
    same(&messages.decode(&full).unwrap(), &sent);
    drop(server);
    same(&messages.decode(&messages.encode(&sent)).unwrap(), &sent);
}
