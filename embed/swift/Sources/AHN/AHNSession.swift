import CAHN
import Foundation

/// A conversation whose memory has a fixed size, however long the text is that it reads.
///
/// > Note: A session does one thing at a time. While it reads or answers, other calls throw
/// > ``AHNError/Kind/busy``; ``fork()`` it before, to ask two questions at once.
public final class AHNSession: @unchecked Sendable {
  /// How far a text is read.
  public struct Progress: Sendable, Equatable {
    /// Tokens read, and those of the whole text.
    public let read: Int, total: Int
    public var fraction: Double { total == 0 ? 1 : Double(read) / Double(total) }
  }

  /// How an answer is made.
  public struct Options: Sendable {
    /// The longest answer, in tokens.
    public var maximumTokens: Int
    /// 0 always takes the likeliest token.
    public var temperature: Float
    /// Only the likeliest tokens that have this share of the probability.
    public var topP: Float
    /// Makes sampling repeatable.
    public var seed: UInt64
    /// Texts that end the answer and are not said.
    public var stops: [String]

    public init(
      maximumTokens: Int = 256, temperature: Float = 0, topP: Float = 1,
      seed: UInt64 = 0, stops: [String] = []
    ) {
      self.maximumTokens = maximumTokens
      self.temperature = temperature
      self.topP = topP
      self.seed = seed
      self.stops = stops
    }
  }

  // Keeps the model open for as long as anyone may ask for another session.
  public let model: AHNModel
  private let handle: OpaquePointer

  init(model: AHNModel, handle: OpaquePointer) {
    self.model = model
    self.handle = handle
  }

  deinit { ahn_session_free(handle) }

  /// Tokens read and generated so far.
  public var tokenCount: Int { ahn_session_tokens(handle) }

  /// Bytes of sinks, window and memory; they do not grow.
  public var memoryBytes: Int { ahn_session_bytes(handle) }

  /// Reads more of the user's message.
  ///
  /// Cancelling the task stops between two steps and throws `CancellationError`; the session has
  /// then read as much as `progress` said.
  ///
  /// - Parameters:
  ///   - text: Any length.
  ///   - name: What a memory file calls the text.
  ///   - progress: Called after each step, on a thread of its own.
  public func read(
    _ text: String, name: String? = nil,
    progress: (@Sendable (Progress) -> Void)? = nil
  ) async throws {
    try await reading(progress) { handle, callback, context in
      var text = text
      return text.withUTF8 { bytes in
        bytes.withMemoryRebound(to: CChar.self) { bytes in
          withOptionalCString(name) {
            ahn_session_read(handle, bytes.baseAddress, bytes.count, $0, callback, context)
          }
        }
      }
    }
  }

  /// Reads token ids as they are.
  public func read(
    ids: [Int32], progress: (@Sendable (Progress) -> Void)? = nil
  ) async throws {
    try await reading(progress) { handle, callback, context in
      ahn_session_read_ids(handle, ids, ids.count, callback, context)
    }
  }

  /// The answer to a question, piece by piece as it comes; both become part of the memory.
  ///
  /// An empty question answers the message that was read, or continues a plain text. Leaving the
  /// loop, or cancelling its task, ends the answer there.
  public func streamResponse(
    to question: String, options: Options = Options()
  ) -> AsyncThrowingStream<String, Error> {
    AsyncThrowingStream { continuation in
      let stop = Stop()
      continuation.onTermination = { _ in stop.ask() }
      Task.detached {
        do {
          try await Blocking.run {
            try self.generate(question, options, stop) { continuation.yield($0) }
          }
          continuation.finish()
        } catch {
          continuation.finish(throwing: error)
        }
      }
    }
  }

  /// The whole answer to a question; both become part of the memory.
  ///
  /// Cancelling the task ends the answer where it is, and throws `CancellationError`.
  public func respond(to question: String, options: Options = Options()) async throws -> String {
    let stop = Stop()
    let answer = try await withTaskCancellationHandler {
      try await Blocking.run {
        var all = ""
        try self.generate(question, options, stop) { all += $0 }
        return all
      }
    } onCancel: {
      stop.ask()
    }
    try Task.checkCancellation()
    return answer
  }

  /// Another session with the same past. It costs nothing until one of them goes on.
  public func fork() throws -> AHNSession {
    var made: OpaquePointer?
    try AHNError.check(ahn_session_fork(handle, &made))
    return AHNSession(model: model, handle: made!)
  }

  /// Writes all of it to one file, by a temporary name; nothing but a memory is replaced.
  public func save(to url: URL) async throws {
    try await Blocking.run { try AHNError.check(ahn_session_save(self.handle, url.path)) }
  }

  // What callbacks of C find behind their pointer.
  private final class Context {
    let stop: Stop
    let progress: (@Sendable (Progress) -> Void)?
    let piece: ((String) -> Void)?

    init(
      _ stop: Stop, progress: (@Sendable (Progress) -> Void)? = nil,
      piece: ((String) -> Void)? = nil
    ) {
      self.stop = stop
      self.progress = progress
      self.piece = piece
    }

    static func of(_ pointer: UnsafeMutableRawPointer?) -> Context {
      Unmanaged<Context>.fromOpaque(pointer!).takeUnretainedValue()
    }
  }

  private typealias Reader =
    @Sendable (OpaquePointer, ahn_progress, UnsafeMutableRawPointer) -> ahn_status

  private func reading(
    _ progress: (@Sendable (Progress) -> Void)?, _ read: @escaping Reader
  ) async throws {
    let stop = Stop()
    try await withTaskCancellationHandler {
      try Task.checkCancellation()
      try await Blocking.run {
        let context = Context(stop, progress: progress)
        try withExtendedLifetime(context) {
          let pointer = Unmanaged.passUnretained(context).toOpaque()
          try AHNError.check(read(self.handle, Self.onProgress, pointer))
        }
      }
    } onCancel: {
      stop.ask()
    }
  }

  private func generate(
    _ question: String, _ options: Options, _ stop: Stop, _ piece: @escaping (String) -> Void
  ) throws {
    let context = Context(stop, piece: piece)
    let stops = options.stops.map { strdup($0) }
    defer { stops.forEach { free($0) } }
    let pointers = stops.map { UnsafePointer<CChar>($0) }
    guard options.maximumTokens > 0 else {
      throw AHNError(kind: .badArgument, message: "maximumTokens must be at least 1")
    }
    var question = question
    let status = withExtendedLifetime(context) {
      pointers.withUnsafeBufferPointer { pointers in
        var chosen = ahn_generate_options(
          max_tokens: options.maximumTokens, temperature: options.temperature,
          top_p: options.topP, seed: options.seed, stops: pointers.baseAddress,
          stop_count: pointers.count, progress: Self.onProgress)
        return question.withUTF8 { bytes in
          bytes.withMemoryRebound(to: CChar.self) {
            ahn_session_generate(
              handle, $0.baseAddress, $0.count, &chosen, Self.onPiece,
              Unmanaged.passUnretained(context).toOpaque(), nil)
          }
        }
      }
    }
    try AHNError.check(status)
  }

  private static let onProgress: ahn_progress = { read, total, pointer in
    let context = Context.of(pointer)
    context.progress?(Progress(read: read, total: total))
    return !context.stop.isAsked
  }

  private static let onPiece: ahn_piece = { text, count, pointer in
    let context = Context.of(pointer)
    let bytes = UnsafeRawBufferPointer(start: text, count: count)
    context.piece?(String(decoding: bytes, as: UTF8.self))
    return !context.stop.isAsked
  }
}
