import XCTest

@testable import AHN

/// With a small model in the directory that AHN_TEST_MODEL names; tests/test_embed_swift.py makes
/// one, and knows what it answers.
final class AHNTests: XCTestCase {
  private var directory: URL!

  override func setUpWithError() throws {
    guard let path = ProcessInfo.processInfo.environment["AHN_TEST_MODEL"] else {
      throw XCTSkip("AHN_TEST_MODEL names no model")
    }
    directory = URL(fileURLWithPath: path)
  }

  private func open() async throws -> AHNModel { try await AHNModel(contentsOf: directory) }

  private var text: String { String(repeating: "call me ishmael. ", count: 30) }
  private let short = AHNSession.Options(maximumTokens: 20)

  func testAnswersAreThoseOfPython() async throws {
    let file = directory.appendingPathComponent("../expected.txt")
    let expected = try String(contentsOf: file, encoding: .utf8)
    let session = try await open().session()
    try await session.read(text)
    let answer = try await session.respond(to: "Why?", options: short)
    XCTAssertEqual(answer, expected)
  }

  func testStreamingSaysWhatRespondingDoes() async throws {
    let session = try await open().session()
    try await session.read(text, name: "a text")
    let other = try session.fork()
    var pieces = ""
    for try await piece in session.streamResponse(to: "Why?", options: short) { pieces += piece }
    let whole = try await other.respond(to: "Why?", options: short)
    XCTAssertEqual(pieces, whole)
    XCTAssertEqual(session.tokenCount, other.tokenCount)
  }

  func testMemoryDoesNotGrowAndProgressIsTold() async throws {
    let session = try await open().session()
    let seen = Seen()
    try await session.read(text) { seen.add($0) }
    let bytes = session.memoryBytes
    try await session.read(text)
    XCTAssertEqual(bytes, session.memoryBytes)
    XCTAssertEqual(seen.all.last.map { $0.read }, seen.all.last.map { $0.total })
    XCTAssertGreaterThan(seen.all.count, 3)
  }

  func testCancellingStopsReading() async throws {
    let session = try await open().session()
    let long = String(repeating: text, count: 200)
    let begun = expectation(description: "begun")
    begun.assertForOverFulfill = false
    let task = Task { try await session.read(long) { _ in begun.fulfill() } }
    await fulfillment(of: [begun], timeout: 30)
    task.cancel()
    do {
      try await task.value
      XCTFail("it read on")
    } catch is CancellationError {}
    XCTAssertLessThan(session.tokenCount, long.utf8.count)
    let answer = try await session.respond(to: "Why?", options: short)
    XCTAssertFalse(answer.isEmpty)
  }

  func testLeavingTheLoopEndsTheAnswer() async throws {
    let session = try await open().session()
    try await session.read(text)
    let before = session.tokenCount
    let long = AHNSession.Options(maximumTokens: 100_000)
    for try await _ in session.streamResponse(to: "Why?", options: long) { break }
    // It ends at its next token.
    while true {
      do {
        _ = try session.fork()
        break
      } catch let error as AHNError where error.kind == .busy {
        try await Task.sleep(nanoseconds: 10_000_000)
      }
    }
    XCTAssertGreaterThan(session.tokenCount, before)
    XCTAssertLessThan(session.tokenCount, before + 10_000)
  }

  func testTwoSessionsAtOnce() async throws {
    let model = try await open()
    try await withThrowingTaskGroup(of: String.self) { group in
      for _ in 0..<4 {
        group.addTask {
          let session = try model.session()
          try await session.read(self.text)
          return try await session.respond(to: "Why?", options: self.short)
        }
      }
      var answers: Set<String> = []
      for try await answer in group { answers.insert(answer) }
      XCTAssertEqual(answers.count, 1)
    }
  }

  func testSavedAndLoaded() async throws {
    let file = FileManager.default.temporaryDirectory
      .appendingPathComponent("\(UUID().uuidString).ahn")
    defer { try? FileManager.default.removeItem(at: file) }
    let model = try await open()
    let session = try model.session()
    try await session.read(text)
    try await session.save(to: file)
    let other = try await model.session(memory: file)
    XCTAssertEqual(other.tokenCount, session.tokenCount)
    let answers = try await [
      session.respond(to: "Why?", options: short), other.respond(to: "Why?", options: short),
    ]
    XCTAssertEqual(answers[0], answers[1])
  }

  func testTokensAndBack() async throws {
    let model = try await open()
    let ids = try model.encode("Call me Ishmael.")
    XCTAssertEqual(try model.decode(ids), "Call me Ishmael.")
  }

  func testErrorsSayWhatToDo() async throws {
    do {
      _ = try await AHNModel(contentsOf: URL(fileURLWithPath: "/nowhere"))
      XCTFail("it opened")
    } catch let error as AHNError {
      XCTAssertEqual(error.kind, .noFile)
      XCTAssertTrue(error.localizedDescription.contains("/nowhere"))
    }
    let session = try await open().session(plain: true)
    do {
      _ = try await session.respond(to: "")
      XCTFail("it answered")
    } catch let error as AHNError {
      XCTAssertEqual(error.kind, .empty)
    }
  }
}

/// What a callback was told, from another thread.
private final class Seen: @unchecked Sendable {
  private let lock = NSLock()
  private var kept: [AHNSession.Progress] = []

  func add(_ progress: AHNSession.Progress) {
    lock.lock()
    kept.append(progress)
    lock.unlock()
  }

  var all: [AHNSession.Progress] {
    lock.lock()
    defer { lock.unlock() }
    return kept
  }
}
