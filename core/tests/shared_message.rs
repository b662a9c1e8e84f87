//! Messages by the store of a host: the same on the other side, where they lie, and gone when they were read.

use echelon_core::data::{Column, PerToken, Rows};
use echelon_core::loss::{Numbers, Totals};
use echelon_core::message::kind_of_message;
use echelon_core::role::Role;
use echelon_core::shared_message::SharedMessages;
use echelon_core::store::{Store, StoreConfig, StoreServer};
use echelon_core::verb::{Learn, Request, Values};
use tch::{Device, Kind, Tensor};

const ROWS: i64 = 40;

const NUMBERS: Column<PerToken> = Column::new("numbers");
const OTHERS: Column<PerToken> = Column::new("others");

fn request() -> Request<Learn> {
    let row = |n: i64| ((0..9).map(|t| 10 * n + t).collect(), (0..9).map(|t| t > 3).collect());
    let rows = Rows::of_tokens(&(0..ROWS).map(row).collect::<Vec<_>>());
    let numbers = |rows: i64| Tensor::rand([rows, 9], (Kind::Double, Device::Cpu));
    // Rows of another tensor: only these are sent.
    let rows = rows.with(NUMBERS, numbers(3 * ROWS).slice(0, 5, 5 + 2 * ROWS, 2)).unwrap();
    let rows = rows.with(OTHERS, numbers(ROWS)).unwrap();
    let totals = Totals { tokens: 200.0, rows: 40.0, units: 40.0 };
    let verb = Learn { loss: "a loss".into(), numbers: Numbers::of(&[("kl_coef", 0.1)]), totals, unit: 1 };
    Request { role: Some(Role::Actor), verb, rows }
}

fn same(found: &Request<Learn>, expected: &Request<Learn>) {
    assert_eq!((found.role, &found.verb.loss), (expected.role, &expected.verb.loss));
    assert_eq!((found.verb.totals, &found.verb.numbers), (expected.verb.totals, &expected.verb.numbers));
    let (found, expected) = (&found.rows, &expected.rows);
    assert_eq!((&found.token_ids, &found.lengths), (&expected.token_ids, &expected.lengths));
    assert_eq!((&found.own, &found[NUMBERS]), (&expected.own, &expected[NUMBERS]));
    assert_eq!(found[OTHERS], expected[OTHERS]);
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
    let error = to.decode::<Request<Values>>(&from.encode(&sent)).err().unwrap().to_string();
    assert!(error.contains("`values`") && error.contains("`learn`"), "{error}");
    let received: Request<Learn> = to.decode(&bytes).unwrap();
    same(&received, &sent);
    assert_eq!(report().num_held, 1, "its tensors are the store's pages");
    drop(received);
    assert_eq!(report().num_objects, 0, "it was read");
    assert!(to.decode::<Request<Learn>>(&bytes).is_err(), "and is read once");

    let unread = from.encode(&sent);
    from.forget(&unread);
    assert_eq!(report().used_bytes, 0);

    let small = Request { role: None, verb: Values, rows: Rows::of_tokens(&[(vec![1, 2], vec![false, true])]) };
    let bytes = from.encode(&small);
    assert_eq!(kind_of_message(&bytes).as_deref(), Some("values"));
    assert_eq!(to.decode::<Request<Values>>(&bytes).unwrap().rows.token_ids, small.rows.token_ids);
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
